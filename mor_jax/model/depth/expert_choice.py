"""Expert-choice routing: each recursion step picks its top-k tokens (paper 2.2.1, A.2; released configuration).

One linear router a step on the raw hidden state. Selected tokens get H + alpha * sigmoid(z) * Block(H), where
Block(H) is the whole block output, its residual included: gating only the residual's increment would be another
model. The choice is hierarchical (a dropped token never re-enters). Top-k over a row looks into the future, so a
BCE loss teaches sigmoid(z) to sit on the chosen side of 0.5, and causal inference continues while
sigmoid(z) >= threshold; the gate stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.model.program import active_counts


@dataclass(frozen=True)
class ExpertChoice:
    """`capacities`: share of the row kept at r = 1..R, non-increasing."""

    recursions: int
    width: int
    capacities: tuple[float, ...]
    alpha: float
    threshold: float
    init_std: float

    def _router(self) -> nn.LinearRouter:
        return nn.LinearRouter(self.init_std)

    def _example(self) -> jax.Array:
        return jnp.zeros((1, 1, self.width))

    def init(self, key: jax.Array) -> dict:
        keys = jax.random.split(key, self.recursions)
        return jax.vmap(lambda k: nn.init(self._router(), k, self._example()))(keys)

    def logical_axes(self) -> dict:
        names = nn.logical_axes(self._router(), self._example())
        return jax.tree.map(lambda n: ("recursion", *n), names, is_leaf=lambda n: isinstance(n, tuple))

    def counts(self, length: int) -> tuple[int, ...]:
        return active_counts(self.capacities, length)

    def score(self, router: dict, h_BxTxD: jax.Array) -> jax.Array:
        return nn.apply(self._router(), router, h_BxTxD)

    def top(self, z_BxT: jax.Array, candidates_BxT: jax.Array, k: jax.Array | int) -> jax.Array:
        # The k-th largest score, by a plain sort: `lax.top_k` would gather the scores of a sharded batch, and k may be
        # traced. Equal scores go to the earlier position.
        score = jnp.where(candidates_BxT, z_BxT, -jnp.inf)
        kth = jax.lax.dynamic_slice_in_dim(jnp.sort(score, axis=-1), score.shape[-1] - k, 1, axis=-1)
        above, level = score > kth, score == kth
        room = k - jnp.sum(above, axis=-1, keepdims=True)
        return (above | (level & (jnp.cumsum(level, axis=-1) <= room))) & candidates_BxT

    def continues(self, z_BxT: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(z_BxT) >= self.threshold

    def combine(self, h: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        gate = (self.alpha * jax.nn.sigmoid(z))[..., None].astype(h.dtype)
        return h + gate * y

    def aux_loss(self, z: jax.Array, target: jax.Array) -> jax.Array:
        """Binary cross-entropy with logits, on the score before alpha."""
        return jax.nn.softplus(z) - z * target
