"""How a step knows its number: what is done to the state u [B, T, D] that the core reads at step t
= 0, 1, ...

`t` and the steps `r` of the row are one number for all rows or [B] of each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mor_jax.model.recursion.part import Part, of_rows, spread
from mor_jax.nn.parameters import Tree

LONGEST = 10_000.0


def _none(
    params: Tree, u: jax.Array, t: jax.Array | int, r: jax.Array | int, beyond: str
) -> jax.Array:
    return u


def _sinusoid(
    params: Tree, u: jax.Array, t: jax.Array | int, r: jax.Array | int, beyond: str
) -> jax.Array:
    """The timing signal of the Universal Transformer (arXiv 1807.03819), defined for any step."""
    half = u.shape[-1] // 2
    rates = LONGEST ** (-jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1))
    angle = (of_rows(t) + 1) * rates
    signal = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    signal = jnp.pad(signal, [(0, 0)] * (signal.ndim - 1) + [(0, u.shape[-1] - 2 * half)])
    return u + spread(signal, u).astype(u.dtype)


def _learned(
    params: Tree, u: jax.Array, t: jax.Array | int, r: jax.Array | int, beyond: str
) -> jax.Array:
    """A learned vector for each trained step, at first 0; past them the last again ("clamp") or
    from the first on."""
    rows = params["bias"].shape[0]
    index = jnp.asarray(t) % rows if beyond == "modulo" else jnp.minimum(t, rows - 1)
    return u + spread(params["bias"][index], u).astype(u.dtype)


def _time(
    params: Tree, u: jax.Array, t: jax.Array | int, r: jax.Array | int, beyond: str
) -> jax.Array:
    """A factor from the share of the way done and the length of a step, at first 1 (after
    LoopFormer's conditioning on (t, dt), arXiv 2602.11451, with one linear factor in place of its
    adaptive norms): defined for any number of steps."""
    share, length = of_rows(t) / of_rows(r), 1 / of_rows(r)
    return u * (
        1 + spread(share * params["share"]["bias"] + length * params["length"]["bias"], u)
    ).astype(u.dtype)


def _init_time(key: jax.Array, width: int, _: int) -> Tree:
    return {"share": {"bias": jnp.zeros((width,))}, "length": {"bias": jnp.zeros((width,))}}


# apply(params, u, t, r, beyond)
CHOICES = {
    "none": Part(_none),
    "sinusoid": Part(_sinusoid),
    "learned": Part(_learned, lambda key, width, steps: {"bias": jnp.zeros((steps, width))}),
    "time": Part(_time, _init_time),
}
