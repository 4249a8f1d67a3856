"""Fixed depth: every token runs every recursion. R = 1 is the plain Transformer, R > 1 the Recursive Transformer."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Fixed:
    """No router, no gate: the core's output is the next state."""

    recursions: int

    def init(self, key: jax.Array) -> dict:
        return {}

    def logical_axes(self) -> dict:
        return {}

    def counts(self, length: int) -> tuple[int, ...]:
        return (length,) * self.recursions

    def score(self, router: dict, h_BxTxD: jax.Array) -> jax.Array:
        return jnp.zeros(h_BxTxD.shape[:2], jnp.float32)

    def top(self, z_BxT: jax.Array, candidates_BxT: jax.Array, k: jax.Array | int) -> jax.Array:
        return candidates_BxT

    def continues(self, z_BxT: jax.Array) -> jax.Array:
        return jnp.ones(z_BxT.shape, bool)

    def combine(self, h: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        return y

    def aux_loss(self, z: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.zeros_like(z)
