"""Fixed depth: every token runs every recursion. R = 1 is the plain Transformer, R > 1 the
Recursive Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.errors import UserError
from mor_jax.model.depth.base import DepthPolicy, PolicyConfig, RouterStats
from mor_jax.model.program import build_program


@dataclass(frozen=True)
class FixedConfig(PolicyConfig):
    """Every token runs every recursion."""

    policy: str = "fixed"

    routed: ClassVar[bool] = False
    # Nothing is ever missing, so "recursion_wise" and "hybrid" would be "full".
    kv_strategies: ClassVar[tuple[str, ...]] = ("full", "shared")
    exported: ClassVar[bool] = True
    does: ClassVar[str] = "sends every token through every recursion"

    def build(self, model: ModelConfig, stage: int | None = None) -> Fixed:
        return Fixed(build_program(model).recursions)


@dataclass(frozen=True)
class Fixed(DepthPolicy):
    """No router, no gate: the core's output is the next state."""

    recursions: int

    def metrics(self, stats: RouterStats) -> dict[str, jax.Array]:
        return {}

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        raise UserError(
            "this model runs every token through every recursion (depth policy 'fixed'), so there is no mean depth to "
            "dial; a maximum depth can be set."
        )
