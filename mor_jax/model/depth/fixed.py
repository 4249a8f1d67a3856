"""Fixed depth: every token runs every recursion. R = 1 is the plain Transformer, R > 1 the Recursive Transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.errors import UserError
from mor_jax.model.depth.base import Route, RouterStats


@dataclass(frozen=True)
class Fixed:
    """No router, no gate: the core's output is the next state."""

    recursions: int

    def init(self, key: jax.Array) -> dict:
        return {}

    def logical_axes(self) -> dict:
        return {}

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        return ((length,) * self.recursions,)

    def begin(
        self, routers: dict, h_BxTxD: jax.Array, real_BxT: jax.Array, depth_BxT: jax.Array | None = None,
        draw_BxTxR: jax.Array | None = None,
    ) -> Route:  # fmt: skip
        return Route(jnp.arange(self.recursions), ())

    def depths(self, routers: dict, h_BxTxD: jax.Array, dial_BxR: jax.Array | None = None) -> None:
        return None

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        return jnp.zeros(h_BxTxD.shape[:2], jnp.float32)

    def select(
        self, step: Any, z_BxT: jax.Array, candidates_BxT: jax.Array, tokens: Any, k: Any, dial: Any = None
    ) -> jax.Array:
        return candidates_BxT

    def combine(self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: Any) -> jax.Array:
        return y

    def step_stats(self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: Any) -> RouterStats:
        zero = jnp.zeros((), jnp.float32)
        n = jnp.sum(candidates, dtype=jnp.float32)
        return RouterStats(zero, n, n, n, zero, zero, zero, n)

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        return jnp.full((self.recursions,), jnp.sum(real_B), jnp.float32)

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        return {}

    def loss_weights(self) -> dict[str, float]:
        return {}

    def rebalance(self, routers: dict, stats: RouterStats) -> dict:
        return routers

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        raise UserError(
            "this model runs every token through every recursion (depth policy 'fixed'), so there is no mean depth to "
            "dial; a maximum depth can be set."
        )
