"""The state before the first step, [B, T, D]."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mor_jax.config import RecursionConfig
from mor_jax.model.recursion.part import Part
from mor_jax.nn.parameters import Tree

DRAWN = 0xD2A  # seed of the vector of "drawn"
HUGINN_STD = math.sqrt(2 / 5)  # of an element of Huginn's first state, once it is scaled by sqrt(D)


def _embed(
    params: Tree,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    salt_B: jax.Array | None,
    config: RecursionConfig,
) -> jax.Array:
    """What the prelude returned (Universal Transformer, Ouro, RINS)."""
    return e_BxTxD


def _zeros(
    params: Tree,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    salt_B: jax.Array | None,
    config: RecursionConfig,
) -> jax.Array:
    return jnp.zeros_like(e_BxTxD)


def _const(
    params: Tree,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    salt_B: jax.Array | None,
    config: RecursionConfig,
) -> jax.Array:
    """One learned vector (HRM-Text, arXiv 2605.20613; HRM itself draws it once and keeps it)."""
    return jnp.broadcast_to(params["bias"].astype(e_BxTxD.dtype), e_BxTxD.shape)


def _drawn(
    params: Tree,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    salt_B: jax.Array | None,
    config: RecursionConfig,
) -> jax.Array:
    """One vector that is drawn once, truncated normal of standard deviation 1, and never learned
    (HRM, arXiv 2506.21734; TRM, arXiv 2510.04871)."""
    one_D = jax.random.truncated_normal(jax.random.key(DRAWN), -2.0, 2.0, e_BxTxD.shape[-1:])
    return jnp.broadcast_to(one_D.astype(e_BxTxD.dtype), e_BxTxD.shape)


def _random(
    params: Tree,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    salt_B: jax.Array | None,
    config: RecursionConfig,
) -> jax.Array:
    """Truncated normal within 3 standard deviations (Huginn, arXiv 2502.05171).

    A function of the token's place in its document and of the row's salt: training draws anew at
    each step, and inference, which has no salt, draws the same for a token whether its row is
    computed whole or from a cache."""
    std = config.state_std or HUGINN_STD
    key = jax.random.key(0)

    def draw(salt: jax.Array, pos: jax.Array) -> jax.Array:
        key_t = jax.random.fold_in(jax.random.fold_in(key, salt), pos)
        return jax.random.truncated_normal(key_t, -3.0, 3.0, e_BxTxD.shape[-1:], jnp.float32)

    salt_B = jnp.zeros(pos_BxT.shape[:1], jnp.uint32) if salt_B is None else salt_B
    return (
        std * jax.vmap(lambda s, p: jax.vmap(lambda one: draw(s, one))(p))(salt_B, pos_BxT)
    ).astype(e_BxTxD.dtype)


# apply(params, e_BxTxD, pos_BxT, salt_B or None, config)
CHOICES = {
    "embed": Part(_embed),
    "zeros": Part(_zeros),
    "const": Part(
        _const,
        lambda key, width, _: {"bias": jax.random.truncated_normal(key, -2.0, 2.0, (width,))},
    ),
    "drawn": Part(_drawn),
    "random": Part(_random),
}
