"""Adaptive computation time (ACT): each token halts once its halting probabilities sum to 1, and
its output is the mean of its states by them (Graves, arXiv 1603.08983; per token, over a shared
block: Universal Transformer, arXiv 1807.03819).

After step n the state s_n gives p_n = sigmoid(w s_n + b). A token halts at the first N with
p_1 + ... + p_N >= 1 - epsilon, or at the last step; its last weight is what is left, the remainder
1 - (p_1 + ... + p_{N-1}), so the weights sum to 1. The ponder cost N + remainder is added to the
loss; as in the paper only the remainder has a gradient. Training and causal inference halt by this
one rule, which looks at a token's own states alone: nothing sees the future.

A step is known to be the last only after it has run, so both executors compute all tokens in
training (they are the masked one); decoding skips a step that no token of the batch runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.config.refusals import not_negative
from mor_jax.errors import ConfigError
from mor_jax.model.depth.base import DepthPolicy, PolicyConfig, RouterStats, router_metrics
from mor_jax.nn.parameters import Tree


@dataclass(frozen=True)
class AdaptiveConfig(PolicyConfig):
    """Each token halts by a learned probability, and its output is a mean over its steps."""

    policy: str = "act"
    # tau, of the mean ponder cost of a token (Tensor2Tensor: 0.01; 0: no pressure to stop)
    ponder_weight: float = 0.01
    epsilon: float = 0.01  # a token halts once its probabilities sum to 1 - epsilon
    halting_bias: float = 1.0  # b before training, as in Tensor2Tensor

    halts: ClassVar[bool] = True
    # first as in the Universal Transformer, where a token that halted stays visible
    kv_strategies: ClassVar[tuple[str, ...]] = ("hybrid", "recursion_wise")
    does: ClassVar[str] = "halts each token by its own states"

    def check(self, model: ModelConfig) -> None:
        not_negative("config.depth", ponder_weight=self.ponder_weight)
        if not 0 < self.epsilon < 1:
            raise ConfigError(
                f"config.depth.epsilon is the chance that need not be used up, between 0 and 1; got {self.epsilon}."
            )
        super().check(model)

    def build(self, model: ModelConfig, stage: int | None = None) -> Adaptive:
        return Adaptive(
            model.recursions,
            model.width,
            model.init_std,
            self.ponder_weight,
            self.epsilon,
            self.halting_bias,
        )


class Spent(NamedTuple):
    """What is known of each token so far, float32."""

    used_BxT: jax.Array  # sum of its probabilities; 1 once it has halted
    rest_BxT: jax.Array  # what was left before its last step
    mean_BxTxD: jax.Array  # of its states, by their weights


@dataclass(frozen=True)
class Adaptive(DepthPolicy):
    """One gate for all steps."""

    recursions: int
    width: int
    init_std: float
    ponder_weight: float
    epsilon: float
    halting_bias: float

    halts: ClassVar[bool] = True

    def init(self, key: jax.Array) -> Tree:
        kernel = self.init_std * jax.random.normal(key, (1, self.width), jnp.float32)
        return {"kernel": kernel, "bias": jnp.full((1,), self.halting_bias, jnp.float32)}

    def logical_axes(self) -> Tree:
        return {"kernel": (None, None), "bias": (None,)}

    def steps(self, routers: Tree) -> Tree:
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (self.recursions, *leaf.shape)), routers
        )

    def remember(self, h_BxTxD: jax.Array) -> Spent:
        none = jnp.zeros(h_BxTxD.shape[:2], jnp.float32)
        return Spent(none, none + 1, jnp.zeros(h_BxTxD.shape, jnp.float32))

    def judge(
        self, step: Tree, memory: Spent, before: jax.Array, after: jax.Array
    ) -> tuple[jax.Array, Spent]:
        used, runs = memory.used_BxT, memory.used_BxT < 1
        state = after.astype(jnp.float32)
        p = jax.nn.sigmoid(state @ step["kernel"][0] + step["bias"][0])
        stops = used + p >= 1 - self.epsilon
        weight = jnp.where(runs, jnp.where(stops, 1 - used, p), 0.0)
        return ~stops, Spent(
            jnp.where(runs, jnp.where(stops, 1.0, used + p), used),
            jnp.where(runs, 1 - used, memory.rest_BxT),
            memory.mean_BxTxD + weight[..., None] * state,
        )

    def finish(self, memory: Spent, h_BxTxD: jax.Array) -> jax.Array:
        """The mean; what is left of tokens that never halted goes to their last state."""
        left = (1 - memory.used_BxT)[..., None]
        return (memory.mean_BxTxD + left * h_BxTxD.astype(jnp.float32)).astype(h_BxTxD.dtype)

    def finish_stats(self, memory: Spent, real_BxT: jax.Array, stats: RouterStats) -> RouterStats:
        rest = jnp.sum(jnp.where(real_BxT, memory.rest_BxT, 0.0))
        return stats._replace(aux=stats.aux.at[-1].add(rest))

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        """Mean ponder cost of a token: its steps and the remainder."""
        return {"ponder_loss": (jnp.sum(stats.selected) + jnp.sum(stats.aux)) / totals_R[0]}

    def loss_weights(self) -> dict[str, float]:
        return {"ponder_loss": self.ponder_weight}

    def metrics(self, stats: RouterStats) -> dict[str, jax.Array]:
        """The share of tokens that ran each step; there are no scores to tell of."""
        found = router_metrics(stats)
        return {name: value for name, value in found.items() if name.endswith("/selected")}

    def router_flops(self, length: int, ran_R: Any) -> float:
        return 2.0 * self.width * sum(ran_R)
