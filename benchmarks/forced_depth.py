"""A model whose tokens have depths of a given distribution, for measurements: the distribution is data, so that every
one runs in the same compiled programs, and the work is that of a routed model of this shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.model.depth.base import Route
from mor_jax.model.depth.fixed import Fixed
from mor_jax.model.lm import LM

SHARES = "shares"  # the router's only parameter, [R]: share of tokens that run step r


class Depth(NamedTuple):
    """What a token carries."""

    depth_BxT: jax.Array


@dataclass(frozen=True)
class Forced(Fixed):
    """Each token's depth by a hash of its state before the recursion, laid on the given shares."""

    def init(self, key: jax.Array) -> dict:
        return {SHARES: jnp.ones((self.recursions,), jnp.float32)}

    def logical_axes(self) -> dict:
        return {SHARES: ("recursion",)}

    def begin(
        self, routers: dict, h_BxTxD: jax.Array, real_BxT: jax.Array, depth_BxT: jax.Array | None = None,
        draw_BxTxR: jax.Array | None = None,
    ) -> Route:  # fmt: skip
        depth_BxT = self.depths(routers, h_BxTxD) if depth_BxT is None else depth_BxT
        return Route(jnp.arange(1, self.recursions + 1), Depth(jnp.where(real_BxT, depth_BxT, 0)))

    def regated(self, routers: dict, tokens: Depth, dial_BxR: Any, floor_B: Any, cap_B: Any) -> Depth:
        return tokens

    def depths(self, routers: dict, h_BxTxD: jax.Array, dial_BxR: jax.Array | None = None) -> jax.Array:
        raw = jax.lax.bitcast_convert_type(h_BxTxD.astype(jnp.float32), jnp.uint32)
        odd = jnp.arange(raw.shape[-1], dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
        mixed = jnp.sum(raw * odd, axis=-1, dtype=jnp.uint32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
        uniform = ((mixed ^ (mixed >> 16)) >> 8).astype(jnp.float32) * 2.0**-24
        return jnp.sum(uniform[..., None] < routers[SHARES], axis=-1, dtype=jnp.int32)

    def select(
        self, step: Any, z_BxT: jax.Array, candidates_BxT: jax.Array, tokens: Depth, k: Any, dial: Any = None
    ) -> jax.Array:
        return candidates_BxT & (tokens.depth_BxT >= step)


@dataclass(frozen=True)
class ForcedLM(LM):
    """An `LM` of this shape under `Forced`; `depth` must be a routed policy, whose KV strategy counts."""

    @functools.cached_property
    def policy(self) -> Forced:
        return Forced(self.program.recursions)


def with_shares(params: dict, shares: tuple[float, ...]) -> dict:
    """The parameters with another distribution."""
    return params | {"router": {SHARES: jnp.asarray(shares, jnp.float32)}}
