"""Expert-choice routing: each recursion step picks its top-k tokens (paper 2.2.1, A.2; released configuration).

One router a step on the raw hidden state. Selected tokens get H + alpha * score * Block(H), where Block(H) is the
whole block output, its residual included: gating only the residual's increment would be another model. The choice is
hierarchical (a dropped token never re-enters). Top-k over a row looks into the future, so a BCE loss teaches
sigmoid(z) to sit on the chosen side of 0.5, and causal inference continues while sigmoid(z) >= threshold; the gate
stays. A survey of the scores, taken while training, turns any mean depth into thresholds of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax import nn
from mor_jax.model.depth import survey
from mor_jax.model.depth.base import Route, RouterStats, in_range, top_k
from mor_jax.model.depth.survey import SURVEY
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

    def _example(self) -> np.ndarray:
        return np.zeros((1, 1, self.width), np.float32)

    def init(self, key: jax.Array) -> dict:
        keys = jax.random.split(key, self.recursions)
        params = jax.vmap(lambda k: nn.init(self._module(), k, self._example()))(keys)
        # A weight like any other to checkpoints and shardings, but moved by `rebalance`, never by a gradient.
        return params | {SURVEY: survey.empty(self.recursions)}

    def logical_axes(self) -> dict:
        names = nn.logical_axes(self._module(), self._example())
        names = jax.tree.map(lambda n: ("recursion", *n), names, is_leaf=lambda n: isinstance(n, tuple))
        return names | {SURVEY: ("recursion", None)}

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        return (active_counts(self.capacities, length),)

    def begin(
        self, routers: dict, h_BxTxD: jax.Array, real_BxT: jax.Array, depth_BxT: jax.Array | None = None
    ) -> Route:
        return Route({name: leaf for name, leaf in routers.items() if name != SURVEY}, ())

    def depths(self, routers: dict, h_BxTxD: jax.Array, dial_BxR: jax.Array | None = None) -> None:
        return None

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        return nn.apply(self._module(), step, h_BxTxD / self.temperature)[..., 0]

    def select(
        self, step: Any, z_BxT: jax.Array, candidates_BxT: jax.Array, tokens: Any, k: Any, dial: Any = None
    ) -> jax.Array:
        if k is None:
            on = jax.nn.sigmoid(z_BxT) >= self.threshold
            on = on if dial is None else jnp.where(jnp.isnan(dial), on, z_BxT >= dial)
            return candidates_BxT & on
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
            above=survey.count_above(z, candidates),
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
        return survey.continued(routers, stats.above)

    def shares(self, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        """[R]: share of all tokens that run each step so that their mean depth is this.

        Below the depth of training the deepest steps give way first; above it every step is raised to one common
        share. On this path a step narrows either as it did in training, or is the first to do otherwise and sees the
        candidates it saw in training, or lets all or none of them through: so the survey, which knows the candidates
        of training alone, says exactly where the thresholds lie (where a floor of 2 or more has changed the
        candidates, nearly).
        """
        share = np.asarray(self.capacities, np.float64)
        share = np.where(np.arange(len(share)) < floor, 1.0, share) * (np.arange(len(share)) < cap)
        surplus = share.sum() - mean_depth
        if surplus >= 0:
            for r in reversed(range(floor, cap)):
                taken = min(share[r], surplus)
                share[r] -= taken
                surplus -= taken
            return share
        low, high = share[cap - 1], 1.0  # the common share, by bisection: the mean depth grows with it
        for _ in range(60):
            level = (low + high) / 2
            low, high = (level, high) if np.maximum(share[:cap], level).sum() < mean_depth else (low, level)
        share[:cap] = np.maximum(share[:cap], high)
        return share

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        in_range(mean_depth, floor, cap)
        share = self.shares(mean_depth, floor, cap)
        before = np.concatenate([[1.0], share[:-1]])
        kept = np.divide(share, before, out=np.zeros_like(share), where=before > 0)
        kept = np.where(np.abs(kept - np.round(kept)) < 1e-9, np.round(kept), kept)  # all is all, none is none
        reach = survey.reach(survey_RxG)
        return np.array([survey.score_reached_by(k, of) for k, of in zip(kept, reach, strict=True)], np.float32)
