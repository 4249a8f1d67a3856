"""Mixture-of-Depths: each routed step takes its top-k tokens of the whole row, and the others pass
it by (Raposo et al., arXiv 2404.02258).

Routing, gate and causal rule are those of expert choice (`expert_choice.py`), with three
differences. A token that one step left out may run the next. A step of capacity 1 has no router:
everyone runs it, ungated. And a routed step adds g (Block(H) - H): the residual is not gated. With
`config.model.networks` = R each step has weights of its own, as in the paper; with one network they
are shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.errors import ConfigError, UserError
from mor_jax.model.depth import survey
from mor_jax.model.depth.base import DepthPolicy, RouterStats
from mor_jax.model.depth.expert_choice import SCORE, ExpertChoice, ExpertChoiceConfig
from mor_jax.model.depth.survey import SURVEY
from mor_jax.model.program import active_counts, tiled
from mor_jax.nn.parameters import Tree

ROUTED_SHARE = 0.125  # of the paper's best models
SHARE = "share"


@dataclass(frozen=True)
class MixtureOfDepthsConfig(ExpertChoiceConfig):
    """Routed steps take their top-k tokens of the whole row. `capacities`: of each step, in any
    order; (): every second step 0.125, the others 1."""

    policy: str = "mod"

    staged: ClassVar[bool] = False
    exported: ClassVar[bool] = False
    kv_strategies: ClassVar[tuple[str, ...]] = ("recursion_wise",)
    gates: ClassVar[tuple[str, ...]] = ("multiplicative",)

    def shares(self, model: ModelConfig) -> tuple[float, ...]:
        given = self.capacities or tuple(
            itertools.islice(itertools.cycle((1.0, ROUTED_SHARE)), model.recursions)
        )
        return tiled(given, model.context, self.tile)

    def _check_order(self) -> None:
        """Any: a token that was left out comes back."""

    def check(self, model: ModelConfig) -> None:
        if self.inference == "auxiliary":
            raise ConfigError(
                "config.depth.inference = 'auxiliary' is not made for policy 'mod'. Use 'threshold' or 'calibrated'."
            )
        super().check(model)

    def build(self, model: ModelConfig, stage: int | None = None) -> MixtureOfDepths:
        return MixtureOfDepths(**self._fields(model, stage))


@dataclass(frozen=True)
class MixtureOfDepths(ExpertChoice):
    """Capacities may rise and fall."""

    dials: ClassVar[bool] = False
    reenters: ClassVar[bool] = True

    def steps(self, routers: Tree) -> Tree:
        return super().steps(routers) | {SHARE: jnp.asarray(self.capacities, jnp.float32)}

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        return super().score({n: leaf for n, leaf in step.items() if n != SHARE}, h_BxTxD)

    def select(
        self,
        step: Any,
        z_BxT: jax.Array,
        candidates_BxT: jax.Array,
        tokens: Any,
        k: Any,
        dial: Any = None,
    ) -> jax.Array:
        chosen = super().select(step, z_BxT, candidates_BxT, tokens, k, dial)
        return jnp.where(step[SHARE] >= 1, candidates_BxT, chosen)

    def combine(
        self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: Any
    ) -> jax.Array:
        gate = (self.alpha * SCORE[self.score_name](z))[..., None].astype(h.dtype)
        return jnp.where(step[SHARE] >= 1, y, h + gate * (y - h))

    def step_stats(
        self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: Any
    ) -> RouterStats:
        stats = super().step_stats(step, z, candidates, active, tokens)
        routed = (step[SHARE] < 1).astype(jnp.float32)
        return stats._replace(aux=stats.aux * routed, z_sq=stats.z_sq * routed)

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        return DepthPolicy.candidate_counts(self, real_B, length)

    def expected_shares(self, routers: Tree) -> tuple[float, ...]:
        try:
            reach = survey.reach(np.asarray(routers.get(SURVEY, ())))
        except UserError:
            return self.capacities
        cut = float(np.log(self.threshold / (1 - self.threshold)))
        above = survey.share_above(reach, cut).tolist()
        return tuple(1.0 if c >= 1 else a for c, a in zip(self.capacities, above, strict=True))

    def router_flops(self, length: int, ran_R: Sequence[float]) -> float:
        """A router of each routed step reads all tokens."""
        routed = sum(c < 1 for c in self.capacities)
        return self._router_flops_per_token() * length * routed

    def candidates_kept(self) -> np.ndarray:
        return np.asarray(active_counts(self.capacities, 1 << 20), np.float64) / (1 << 20)

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        return DepthPolicy.dial(self, survey_RxG, mean_depth, floor, cap)
