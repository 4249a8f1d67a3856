"""Expert-choice routing: each recursion step picks its top-k tokens (paper 2.2.1, A.2; released
configuration).

One router a step on the raw hidden state. Selected tokens get H + alpha * score * Block(H), where
Block(H) is the whole block output, its residual included: gating only the residual's increment
would be another model. The choice is hierarchical (a dropped token never re-enters). Top-k over a
row looks into the future, so a BCE loss teaches sigmoid(z) to sit on the chosen side of 0.5, and
causal inference continues while sigmoid(z) >= threshold; the gate stays. A survey of the scores,
taken while training, turns any mean depth into thresholds of their own.

Two other rules of causal inference, by name. "auxiliary" (paper 2.2.1, appendix A.2): the BCE is
taken off the router and teaches a second one of the same kind on the detached state, which alone
decides at inference; the gate is still the first one's. "calibrated": no threshold is assumed, but
read off the survey, such that each step keeps of its candidates the share it kept in training. The
survey is of the scores that decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax import nn
from mor_jax.config import ModelConfig
from mor_jax.config.refusals import not_negative, one_of, positive
from mor_jax.errors import ConfigError, UserError
from mor_jax.model.depth import survey
from mor_jax.model.depth.base import (
    DepthPolicy,
    RouterStats,
    check_reachable,
    kept_of,
    rounded_scores,
    shares_at,
    top_k,
)
from mor_jax.model.depth.fields import Routed, WithCapacities
from mor_jax.model.depth.survey import SURVEY
from mor_jax.model.depth.warmup import is_warm, shares_in
from mor_jax.model.program import active_counts
from mor_jax.nn.parameters import Tree
from mor_jax.parallel.rows import join_rows, own_part

INFERENCE = ("threshold", "auxiliary", "calibrated")
SCORE = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "none": lambda z: z}
AUXILIARY = "auxiliary"  # name of the second router among the parameters
THRESHOLDS = "thresholds"
# sigmoid(z) = 0.5, tanh(z) = 0 and z = 0 are the same place: one threshold, in sigmoid units,
# serves all three.


@dataclass(frozen=True)
class ExpertChoiceConfig(Routed, WithCapacities):
    """Each recursion step picks its top-k tokens."""

    policy: str = "expert_choice"
    # of the router's BCE, summed over r; same under any accumulation
    aux_loss_weight: float = 0.001
    threshold: float = 0.5  # causal inference: continue while sigmoid(z) >= threshold
    # What causal inference goes by: threshold (the router's own score, taught by the BCE) |
    # auxiliary (a second router on the detached state, taught by the BCE in place of the first;
    # same threshold) | calibrated (the router's score, against the thresholds that its survey finds
    # for `capacities`)
    inference: str = "threshold"
    aux_lr: float = 10.0  # auxiliary: learning rate of the second router, over the model's

    scores: ClassVar[tuple[str, ...]] = ("sigmoid", "tanh", "none")
    gates: ClassVar[tuple[str, ...]] = ("multiplicative", "additive")
    exported: ClassVar[bool] = True
    does: ClassVar[str] = "picks the tokens of a step row by row"

    @classmethod
    def why_not(cls, field: str) -> str:
        balance = "needs no balance: under policy 'expert_choice' capacities do that"
        return balance if field in ("bias_rate", "balance_loss_weight") else cls.does

    def check(self, model: ModelConfig) -> None:
        where = "config.depth"
        one_of(f"{where}.inference", self.inference, INFERENCE)
        not_negative(where, aux_loss_weight=self.aux_loss_weight)
        positive(where, aux_lr=self.aux_lr)
        if self.inference == "auxiliary" and not self.aux_loss_weight:
            raise ConfigError(
                f"{where}.inference = 'auxiliary' goes by a router that only the auxiliary loss teaches, but "
                f"{where}.aux_loss_weight = 0. Set it, or use inference = 'calibrated'."
            )
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"{where}.threshold must be between 0 and 1 (it is compared with a sigmoid), got {self.threshold}."
            )
        super().check(model)

    def learning_rates(self) -> dict[str, float]:
        return {AUXILIARY: self.aux_lr} if self.inference == "auxiliary" else {}

    def _fields(self, model: ModelConfig, stage: int | None) -> dict[str, Any]:
        return {
            "recursions": model.recursions,
            "width": model.width,
            "capacities": shares_in(model, self, stage),
            "alpha": self.gate_scale,
            "threshold": self.threshold,
            "init_std": model.init_std,
            "score_name": self.score_name,
            "gate": self.gate_name,
            "router": self.router,
            "temperature": self.temperature,
            "aux_loss_weight": self.aux_loss_weight,
            "z_loss_weight": self.z_loss_weight,
            "inference": self.inference,
            "surveyed": stage is None or not is_warm(self, stage),
        }

    def build(self, model: ModelConfig, stage: int | None = None) -> ExpertChoice:
        return ExpertChoice(**self._fields(model, stage))


@dataclass(frozen=True)
class ExpertChoice(DepthPolicy):
    """`inference`: threshold | auxiliary | calibrated. `capacities`: share of the row kept at r =
    1..R, non-increasing.
    `score`: sigmoid | tanh | none. `gate`: multiplicative, H + alpha * score * y, or additive, H +
    y (the score only ranks)."""

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
    inference: str = "threshold"
    surveyed: bool = True  # whether a training step's scores enter the survey

    dials: ClassVar[bool] = True

    def _module(self) -> nn.Router:
        return nn.Router(self.router, 1, self.init_std)

    def _example(self) -> np.ndarray:
        return np.zeros((1, 1, self.width), np.float32)

    def init(self, key: jax.Array) -> Tree:
        def init(key: jax.Array) -> Tree:
            return jax.vmap(lambda k: nn.init(self._module(), k, self._example()))(
                jax.random.split(key, self.recursions)
            )

        params = init(key)
        if self.inference == "auxiliary":
            params |= {AUXILIARY: init(jax.random.fold_in(key, 1))}
        # A weight like any other to checkpoints and shardings, but moved by `rebalance`, never by a
        # gradient.
        return params | {SURVEY: survey.empty(self.recursions)}

    def logical_axes(self) -> Tree:
        names = nn.logical_axes(self._module(), self._example())
        names = jax.tree.map(
            lambda n: ("recursion", *n), names, is_leaf=lambda n: isinstance(n, tuple)
        )
        if self.inference == "auxiliary":
            names |= {AUXILIARY: dict(names)}
        return names | {SURVEY: ("recursion", None)}

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        return (active_counts(self.capacities, length),)

    def steps(self, routers: Tree) -> Tree:
        steps = {name: leaf for name, leaf in routers.items() if name != SURVEY}
        if self.inference == "calibrated":
            steps[THRESHOLDS] = survey.thresholds(routers[SURVEY], self.candidates_kept())
        return steps

    def derived(self, routers: Tree) -> Tree:
        calibrated = self.inference == "calibrated"
        return {THRESHOLDS: self.steps(routers)[THRESHOLDS]} if calibrated else {}

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        """[B, T]; with an auxiliary router [B, T, 2], its own score second."""

        def run(weights: Tree, h: jax.Array) -> jax.Array:
            return nn.apply(self._module(), weights, h / self.temperature)[..., 0]

        z_BxT = run(
            {name: leaf for name, leaf in step.items() if name not in (AUXILIARY, THRESHOLDS)},
            h_BxTxD,
        )
        if self.inference != "auxiliary":
            return z_BxT
        return jnp.stack([z_BxT, run(step[AUXILIARY], jax.lax.stop_gradient(h_BxTxD))], axis=-1)

    def _own(self, z: jax.Array) -> jax.Array:
        """The router's score: what top-k ranks and the gate is made of."""
        return z[..., 0] if self.inference == "auxiliary" else z

    def _deciding(self, z: jax.Array) -> jax.Array:
        """The score that causal inference goes by."""
        return z[..., 1] if self.inference == "auxiliary" else z

    def select(
        self,
        step: Any,
        z_BxT: jax.Array,
        candidates_BxT: jax.Array,
        tokens: Any,
        k: Any,
        dial: Any = None,
    ) -> jax.Array:
        if k is not None:
            return top_k(rounded_scores(self._own(z_BxT), candidates_BxT), candidates_BxT, k)
        z = self._deciding(z_BxT)
        on = jax.nn.sigmoid(z) >= self.threshold
        if self.inference == "calibrated":
            on = jnp.where(jnp.isnan(step[THRESHOLDS]), on, z >= step[THRESHOLDS])
        on = on if dial is None else jnp.where(jnp.isnan(dial), on, z >= dial)
        return candidates_BxT & on

    def combine(
        self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: Any
    ) -> jax.Array:
        if self.gate == "additive":
            return h + y
        gate = (self.alpha * SCORE[self.score_name](self._own(z)))[..., None].astype(h.dtype)
        return h + gate * y

    def step_stats(
        self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: Any
    ) -> RouterStats:
        weight, ran = candidates.astype(jnp.float32), active.astype(jnp.float32)
        own, deciding = self._own(z), self._deciding(z)
        score = SCORE[self.score_name](own)
        # Binary cross-entropy with logits, on the score before alpha.
        bce = jax.nn.softplus(deciding) - deciding * ran
        rival = active
        # as many tokens a row as ran, by the other router's scores
        if self.inference == "auxiliary":
            rival = _as_many(deciding, candidates, active)
        return RouterStats(
            aux=jnp.sum(bce * weight),
            candidates=jnp.sum(weight),
            selected=jnp.sum(ran),
            agree=jnp.sum((self.select(step, z, candidates, tokens, None) == active) * weight),
            score=jnp.sum(score * weight),
            score_sq=jnp.sum(jnp.square(score) * weight),
            z_sq=jnp.sum(jnp.square(own) * weight),  # one logit: logsumexp(z) is z
            overlap=jnp.sum((rival & active).astype(jnp.float32)),
            above=survey.count_above(deciding, candidates),
        )

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        kept = (length, *active_counts(self.capacities, length)[:-1])
        return jnp.stack([jnp.sum(jnp.minimum(real_B, k)) for k in kept]).astype(jnp.float32)

    def metrics(self, stats: RouterStats) -> dict[str, jax.Array]:
        found = super().metrics(stats)
        if self.inference == "auxiliary":
            shared = stats.overlap / jnp.maximum(stats.selected, 1.0)
            found |= {f"router/{r + 1}/overlap": shared[r] for r in range(self.recursions)}
        return found

    def shares(self) -> tuple[float, ...]:
        return self.capacities

    def expected_shares(self, routers: Tree) -> tuple[float, ...]:
        try:
            reach = survey.reach(np.asarray(routers.get(SURVEY, ())))
        except UserError:
            return self.capacities
        cut = math.log(self.threshold / (1 - self.threshold))
        # A step's row of the survey is about the tokens that came as far.
        return tuple(np.cumprod(survey.share_above(reach, cut)).tolist())

    def router_flops(self, length: int, ran_R: Sequence[float]) -> float:
        """The router of recursion r reads only the survivors of r - 1, and an auxiliary one what
        the first reads."""
        return self._router_flops_per_token() * (length + sum(ran_R[:-1]))

    def _router_flops_per_token(self) -> float:
        """Of one step."""
        routers = 2 if self.inference == "auxiliary" else 1
        return 2.0 * nn.router_size(self.router, self.width, 1) * routers

    def candidates_kept(self) -> np.ndarray:
        return kept_of(np.asarray(self.capacities, np.float64))

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        """BCE and z^2, means over candidates, summed over the recursion steps (released code)."""
        return {
            "router_loss": jnp.sum(stats.aux / totals_R),
            "router_z_loss": jnp.sum(stats.z_sq / totals_R),
        }

    def loss_weights(self) -> dict[str, float]:
        return {"router_loss": self.aux_loss_weight, "router_z_loss": self.z_loss_weight}

    def rebalance(self, routers: Tree, stats: RouterStats) -> Tree:
        return survey.continued(routers, stats.above) if self.surveyed else routers

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        check_reachable(mean_depth, floor, cap)
        share = shares_at(self.capacities, mean_depth, floor, cap)
        kept = kept_of(share)
        # all is all, none is none
        kept = np.where(np.abs(kept - np.round(kept)) < 1e-9, np.round(kept), kept)
        reach = survey.reach(survey_RxG)
        return np.array(
            [survey.score_reached_by(k, of) for k, of in zip(kept, reach, strict=True)], np.float32
        )


def _as_many(z_BxT: jax.Array, candidates_BxT: jax.Array, active_BxT: jax.Array) -> jax.Array:
    """Mask of the highest-scoring candidates, in each row as many as are active."""
    order = jnp.argsort(join_rows(jnp.where(candidates_BxT, -z_BxT, jnp.inf)), axis=-1)
    rank = own_part(jnp.argsort(order, axis=-1))
    return candidates_BxT & (rank < jnp.sum(join_rows(active_BxT), axis=-1, keepdims=True))
