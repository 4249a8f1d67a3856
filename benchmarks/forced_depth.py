"""A model whose tokens have depths of a given distribution, for measurements: the distribution is
data, so that every one runs in the same compiled programs, and the work is that of a routed model
of this shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mor_jax.model.depth import AtOnce, TokenInfo
from mor_jax.model.lm import LM

SHARES = "shares"  # the router's only parameter, [R]: share of tokens that run step r


@dataclass(frozen=True)
class Forced(AtOnce):
    """Each token's depth by a hash of its state before the recursion, laid on the given shares."""

    recursions: int

    def init(self, key: jax.Array) -> dict:
        return {SHARES: jnp.ones((self.recursions,), jnp.float32)}

    def logical_axes(self) -> dict:
        return {SHARES: ("recursion",)}

    def depths(
        self, routers: dict, h_BxTxD: jax.Array, info: TokenInfo, dial_BxR: jax.Array | None = None
    ) -> jax.Array:
        raw = jax.lax.bitcast_convert_type(h_BxTxD.astype(jnp.float32), jnp.uint32)
        odd = jnp.arange(raw.shape[-1], dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
        mixed = jnp.sum(raw * odd, axis=-1, dtype=jnp.uint32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        uniform = ((mixed ^ (mixed >> 16)) >> 8).astype(jnp.float32) * 2.0**-24
        return jnp.sum(uniform[..., None] < routers[SHARES], axis=-1, dtype=jnp.int32)


@dataclass(frozen=True)
class ForcedLM(LM):
    """An `LM` of this shape under `Forced`; `depth` must be a routed policy, whose KV strategy
    counts."""

    @functools.cached_property
    def policy(self) -> Forced:
        return Forced(self.program.recursions)


def with_shares(params: dict, shares: tuple[float, ...]) -> dict:
    """The parameters with another distribution."""
    return params | {"router": {SHARES: jnp.asarray(shares, jnp.float32)}}
