"""Random routing: as many tokens a step as under expert-choice, drawn instead of chosen (paper,
tables 13 and 14).

The control of every claim about learned routing: the same capacities, the same gather, the same
gate scale, and no router. Each token has one uniform number u_r in [0, 1) a recursion step
(`uniforms`). Training keeps the k_r largest of a row, among those that ran the step before; causal
inference continues while u_r >= 1 - c_r / c_{r-1}, which keeps the same shares on average and looks
at nothing but the token itself.

The gate is a constant alpha ("constant": H + alpha * Block(H), what a learned gate saturates at) or
1 ("additive").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.model.depth.base import (
    DepthPolicy,
    Route,
    RouterStats,
    TokenInfo,
    check_reachable,
    kept_of,
    shares_at,
    top_k,
)
from mor_jax.model.depth.fields import Gated, WithCapacities
from mor_jax.model.depth.warmup import shares_in
from mor_jax.model.program import active_counts
from mor_jax.nn.parameters import Tree


@dataclass(frozen=True)
class RandomConfig(Gated, WithCapacities):
    """As many tokens as under expert-choice, drawn."""

    policy: str = "random"
    seed: int = 0  # of the draws

    gates: ClassVar[tuple[str, ...]] = ("constant", "additive")
    does: ClassVar[str] = "draws the tokens of a step, so that nothing is routed by a score"

    def build(self, model: ModelConfig, stage: int | None = None) -> RandomChoice:
        shares = shares_in(model, self, stage)
        return RandomChoice(model.recursions, shares, self.gate_scale, self.gate_name, self.seed)


def uniforms(
    seed: int,
    recursions: int,
    tokens_BxT: jax.Array,
    pos_BxT: jax.Array,
    salt_B: jax.Array | None = None,
) -> jax.Array:
    """[B, T, R] float32 in [0, 1): a function of the seed, the token's id, its position in its
    document, and the salt of its row alone; so a decoder that sees one token draws what a forward
    pass over the row draws.

    `salt_B`: another draw for each row of each training step; None: the one draw of inference.
    """
    salt_B = jnp.zeros(tokens_BxT.shape[:1], jnp.uint32) if salt_B is None else salt_B
    row = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), salt_B)
    along = jax.vmap(jax.random.fold_in, (None, 0))  # one key, T numbers
    place = jax.vmap(along)(row, pos_BxT)
    token = jax.vmap(jax.vmap(jax.random.fold_in))(place, tokens_BxT)
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (recursions,))))(token)


@dataclass(frozen=True)
class RandomChoice(DepthPolicy):
    """`capacities`: as of `ExpertChoice`. `gate`: constant | additive. `seed`: of the draws."""

    recursions: int
    capacities: tuple[float, ...]
    alpha: float
    gate: str = "constant"
    seed: int = 0

    dials: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        return (active_counts(self.capacities, length),)

    def begin(self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo) -> Route:
        if info.ids_BxT is None:
            raise ValueError("random routing needs the ids of its tokens (`TokenInfo.ids_BxT`)")
        draw_BxTxR = uniforms(self.seed, self.recursions, info.ids_BxT, info.pos_BxT, info.salt_B)
        return Route(self.steps(routers), draw_BxTxR)

    def shares(self) -> tuple[float, ...]:
        return self.capacities

    def _thresholds(self) -> jax.Array:
        return jnp.asarray(1 - kept_of(np.asarray(self.capacities, np.float64)), jnp.float32)

    def select(
        self,
        step: Any,
        z_BxT: jax.Array,
        candidates_BxT: jax.Array,
        tokens: jax.Array,
        k: Any,
        dial: Any = None,
    ) -> jax.Array:
        u_BxT = jnp.take(tokens, step, axis=-1)
        if k is not None:
            return top_k(u_BxT, candidates_BxT, k)
        on = u_BxT >= self._thresholds()[step]
        return candidates_BxT & (
            on if dial is None else jnp.where(jnp.isnan(dial), on, u_BxT >= dial)
        )

    def combine(
        self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        return h + (y if self.gate == "additive" else self.alpha * y)

    def step_stats(
        self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: jax.Array
    ) -> RouterStats:
        weight, u = candidates.astype(jnp.float32), jnp.take(tokens, step, axis=-1)
        sums = super().step_stats(step, z, candidates, active, tokens)
        return sums._replace(score=jnp.sum(u * weight), score_sq=jnp.sum(jnp.square(u) * weight))

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        kept = (length, *active_counts(self.capacities, length)[:-1])
        return jnp.stack([jnp.sum(jnp.minimum(real_B, k)) for k in kept]).astype(jnp.float32)

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        """Exact without a survey: the draws are uniform."""
        check_reachable(mean_depth, floor, cap)
        kept = kept_of(shares_at(self.capacities, mean_depth, floor, cap))
        return np.where(kept >= 1, -np.inf, np.where(kept <= 0, np.inf, 1 - kept)).astype(
            np.float32
        )
