"""Expert-choice routing: each recursion step picks its top-k tokens (paper 2.2.1, A.2; released configuration).

One router a step on the raw hidden state. Selected tokens get H + alpha * score * Block(H), where Block(H) is the
whole block output, its residual included: gating only the residual's increment would be another model. The choice is
hierarchical (a dropped token never re-enters). Top-k over a row looks into the future, so a BCE loss teaches
sigmoid(z) to sit on the chosen side of 0.5, and causal inference continues while sigmoid(z) >= threshold; the gate
stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.model.depth.base import Route, RouterStats, top_k
from mor_jax.model.program import active_counts

SCORE = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "none": lambda z: z}
# sigmoid(z) = 0.5, tanh(z) = 0 and z = 0 are the same place: one threshold, in sigmoid units, serves all three.


@dataclass(frozen=True)
class ExpertChoice:
    """`capacities`: share of the row kept at r = 1..R, non-increasing. `score`: sigmoid | tanh | none. `gate`:
    multiplicative, H + alpha * score * y, or additive, H + y (the score only ranks)."""

    recursions: int
    width: int
    capacities: tuple[float, ...]
    alpha: float
    threshold: float
    init_std: float
    score_name: str = "sigmoid"
    gate: str = "multiplicative"
    router: str = "linear"
    temperature: float = 1.0
    aux_loss_weight: float = 0.001
    z_loss_weight: float = 0.0

    def _module(self) -> nn.Router:
        return nn.Router(self.router, 1, self.init_std)

    def _example(self) -> jax.Array:
        return jnp.zeros((1, 1, self.width))

    def init(self, key: jax.Array) -> dict:
        keys = jax.random.split(key, self.recursions)
        return jax.vmap(lambda k: nn.init(self._module(), k, self._example()))(keys)

    def logical_axes(self) -> dict:
        names = nn.logical_axes(self._module(), self._example())
        return jax.tree.map(lambda n: ("recursion", *n), names, is_leaf=lambda n: isinstance(n, tuple))

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        return (active_counts(self.capacities, length),)

    def begin(
        self, routers: dict, h_BxTxD: jax.Array, real_BxT: jax.Array, depth_BxT: jax.Array | None = None
    ) -> Route:
        return Route(routers, ())

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        return nn.apply(self._module(), step, h_BxTxD / self.temperature)[..., 0]

    def select(self, step: Any, z_BxT: jax.Array, candidates_BxT: jax.Array, tokens: Any, k: Any) -> jax.Array:
        if k is None:
            return candidates_BxT & (jax.nn.sigmoid(z_BxT) >= self.threshold)
        return top_k(z_BxT, candidates_BxT, k)

    def combine(self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: Any) -> jax.Array:
        if self.gate == "additive":
            return h + y
        gate = (self.alpha * SCORE[self.score_name](z))[..., None].astype(h.dtype)
        return h + gate * y

    def step_stats(self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: Any) -> RouterStats:
        weight = candidates.astype(jnp.float32)
        score = SCORE[self.score_name](z)
        # Binary cross-entropy with logits, on the score before alpha.
        bce = jax.nn.softplus(z) - z * active.astype(jnp.float32)
        return RouterStats(
            aux=jnp.sum(bce * weight),
            candidates=jnp.sum(weight),
            selected=jnp.sum(active.astype(jnp.float32)),
            agree=jnp.sum((self.select(step, z, candidates, tokens, None) == active) * weight),
            score=jnp.sum(score * weight),
            score_sq=jnp.sum(jnp.square(score) * weight),
            z_sq=jnp.sum(jnp.square(z) * weight),  # one logit: logsumexp(z) is z
        )

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        kept = (length, *active_counts(self.capacities, length)[:-1])
        return jnp.stack([jnp.sum(jnp.minimum(real_B, k)) for k in kept]).astype(jnp.float32)

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        """BCE and z^2, means over candidates, summed over the recursion steps (released code)."""
        return {"router_loss": jnp.sum(stats.aux / totals_R), "router_z_loss": jnp.sum(stats.z_sq / totals_R)}

    def loss_weights(self) -> dict[str, float]:
        return {"router_loss": self.aux_loss_weight, "router_z_loss": self.z_loss_weight}

    def rebalance(self, routers: dict, stats: RouterStats) -> dict:
        return routers
