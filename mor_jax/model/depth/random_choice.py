"""Random routing: as many tokens a step as under expert-choice, drawn instead of chosen (paper, tables 13 and 14).

The control of every claim about learned routing: the same capacities, the same gather, the same gate scale, and no
router. Each token has one uniform number u_r in [0, 1) a recursion step (`uniforms`). Training keeps the k_r largest of
a row, among those that ran the step before; causal inference continues while u_r >= 1 - c_r / c_{r-1}, which keeps the
same shares on average and looks at nothing but the token itself.

The gate is a constant alpha ("constant": H + alpha * Block(H), what a learned gate saturates at) or 1 ("additive").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.model.depth.base import Route, RouterStats, in_range, kept_of, shares_at, top_k
from mor_jax.model.program import active_counts


def uniforms(
    seed: int, recursions: int, tokens_BxT: jax.Array, pos_BxT: jax.Array, salt_B: jax.Array | None = None
) -> jax.Array:
    """[B, T, R] float32 in [0, 1): a function of the seed, the token's id, its position in its document, and the salt
    of its row alone; so a decoder that sees one token draws what a forward pass over the row draws.

    `salt_B`: another draw for each row of each training step; None: the one draw of inference.
    """
    salt_B = jnp.zeros(tokens_BxT.shape[:1], jnp.uint32) if salt_B is None else salt_B
    row = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), salt_B)
    along = jax.vmap(jax.random.fold_in, (None, 0))  # one key, T numbers
    place = jax.vmap(along)(row, pos_BxT)
    token = jax.vmap(jax.vmap(jax.random.fold_in))(place, tokens_BxT)
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (recursions,))))(token)


@dataclass(frozen=True)
class RandomChoice:
    """`capacities`: as of `ExpertChoice`. `gate`: constant | additive. `seed`: of the draws."""

    recursions: int
    capacities: tuple[float, ...]
    alpha: float
    gate: str = "constant"
    seed: int = 0

    def init(self, key: jax.Array) -> dict:
        return {}

    def logical_axes(self) -> dict:
        return {}

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        return (active_counts(self.capacities, length),)

    def begin(
        self, routers: dict, h_BxTxD: jax.Array, real_BxT: jax.Array, depth_BxT: jax.Array | None = None,
        draw_BxTxR: jax.Array | None = None,
    ) -> Route:  # fmt: skip
        if draw_BxTxR is None:
            raise ValueError("random routing needs the draws of its tokens (`LM.draws`)")
        return Route(jnp.arange(self.recursions), draw_BxTxR)

    def depths(self, routers: dict, h_BxTxD: jax.Array, dial_BxR: jax.Array | None = None) -> None:
        return None

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        return jnp.zeros(h_BxTxD.shape[:2], jnp.float32)  # the state has no say

    def _thresholds(self) -> jax.Array:
        return jnp.asarray(1 - kept_of(np.asarray(self.capacities, np.float64)), jnp.float32)

    def select(
        self, step: Any, z_BxT: jax.Array, candidates_BxT: jax.Array, tokens: jax.Array, k: Any, dial: Any = None
    ) -> jax.Array:
        u_BxT = jnp.take(tokens, step, axis=-1)
        if k is not None:
            return top_k(u_BxT, candidates_BxT, k)
        on = u_BxT >= self._thresholds()[step]
        return candidates_BxT & (on if dial is None else jnp.where(jnp.isnan(dial), on, u_BxT >= dial))

    def combine(self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: jax.Array) -> jax.Array:
        return h + (y if self.gate == "additive" else self.alpha * y)

    def step_stats(
        self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: jax.Array
    ) -> RouterStats:
        zero, weight = jnp.zeros((), jnp.float32), candidates.astype(jnp.float32)
        u = jnp.take(tokens, step, axis=-1)
        return RouterStats(
            aux=zero,
            candidates=jnp.sum(weight),
            selected=jnp.sum(active.astype(jnp.float32)),
            agree=jnp.sum((self.select(step, z, candidates, tokens, None) == active) * weight),
            score=jnp.sum(u * weight),
            score_sq=jnp.sum(jnp.square(u) * weight),
            z_sq=zero,
            overlap=jnp.sum(active.astype(jnp.float32)),
        )

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        kept = (length, *active_counts(self.capacities, length)[:-1])
        return jnp.stack([jnp.sum(jnp.minimum(real_B, k)) for k in kept]).astype(jnp.float32)

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        return {}

    def loss_weights(self) -> dict[str, float]:
        return {}

    def rebalance(self, routers: dict, stats: RouterStats) -> dict:
        return routers

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        """Exact without a survey: the draws are uniform."""
        in_range(mean_depth, floor, cap)
        kept = kept_of(shares_at(self.capacities, mean_depth, floor, cap))
        return np.where(kept >= 1, -np.inf, np.where(kept <= 0, np.inf, 1 - kept)).astype(np.float32)
