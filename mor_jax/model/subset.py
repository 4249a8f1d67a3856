"""Rows of a sequence picked by a mask, and put back: gathers in both directions.

The transpose of a gather is a scatter, which is slow on CPUs and not deterministic on GPUs. Because
the picked positions are distinct and known from the mask, both directions (and both gradients) are
gathers here.

A row may be cut along time over devices (`parallel/rows.py`): the mask and the places are then
those of the whole row, arrays are this device's part of theirs, and what is gathered from is put
together first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.parallel.rows import join_rows, own_part


class Subset(NamedTuple):
    """k positions of each row, ascending, so that the picked tokens keep their causal order."""

    index_BxK: jax.Array  # position of the i-th picked token
    slot_BxT: jax.Array  # inverse: where position t went (only meaningful where mask)
    mask_BxT: jax.Array


def subset(mask_BxT: jax.Array, k: int) -> Subset:
    """The positions where `mask` holds; each row must hold exactly k of them."""
    slot = jnp.cumsum(mask_BxT, axis=-1) - 1
    place = jnp.where(mask_BxT, slot, k)  # out of bounds, hence dropped, for the others
    position = jnp.arange(mask_BxT.shape[1], dtype=jnp.int32)
    index = jax.vmap(lambda p: jnp.zeros((k,), jnp.int32).at[p].set(position, mode="drop"))(place)
    return Subset(index, jnp.clip(slot, 0, k - 1), mask_BxT)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(lambda a, i: a[i])(x, index)


def _spread(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def take(s: Subset, x: jax.Array) -> jax.Array:
    """x [B, T, ...] at the picked positions: [B, K, ...]."""
    return _take(s, x) if jnp.issubdtype(x.dtype, jnp.inexact) else _picked(s, x)


def put(s: Subset, x: jax.Array, y: jax.Array) -> jax.Array:
    """x [B, T, ...] with the picked positions replaced by y [B, K, ...]."""
    return _put(s, x, y) if jnp.issubdtype(x.dtype, jnp.inexact) else _replace(s, x, y)


def _picked(s: Subset, x: jax.Array) -> jax.Array:
    return _rows(join_rows(x), own_part(s.index_BxK))


def _back(s: Subset, y: jax.Array) -> jax.Array:
    """y [B, K, ...] by position; anything where nothing was picked."""
    return _rows(join_rows(y), own_part(s.slot_BxT))


def _replace(s: Subset, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(_spread(own_part(s.mask_BxT), x), _back(s, y), x)


@jax.custom_vjp
def _take(s: Subset, x: jax.Array) -> jax.Array:
    return _picked(s, x)


def _take_fwd(s: Subset, x: jax.Array) -> tuple[jax.Array, Subset]:
    return _take(s, x), s


def _take_bwd(s: Subset, g: jax.Array) -> tuple[None, jax.Array]:
    g = _back(s, g)
    return None, jnp.where(_spread(own_part(s.mask_BxT), g), g, jnp.zeros((), g.dtype))


_take.defvjp(_take_fwd, _take_bwd)


@jax.custom_vjp
def _put(s: Subset, x: jax.Array, y: jax.Array) -> jax.Array:
    return _replace(s, x, y)


def _put_fwd(s: Subset, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Subset]:
    return _put(s, x, y), s


def _put_bwd(s: Subset, g: jax.Array) -> tuple[None, jax.Array, jax.Array]:
    return (
        None,
        jnp.where(_spread(own_part(s.mask_BxT), g), jnp.zeros((), g.dtype), g),
        _picked(s, g),
    )


_put.defvjp(_put_fwd, _put_bwd)
