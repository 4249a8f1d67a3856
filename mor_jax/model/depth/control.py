"""Depth at inference, as a value: a dial, a floor and a cap for each sequence of a batch.

`DepthControl` holds arrays only, so turning the dial compiles nothing anew. `Controlled` is a depth
policy that obeys one: the executors and the decoder see a policy like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.model.depth.base import DepthPolicy, Route, RouterStats, TokenInfo
from mor_jax.nn.parameters import Tree


class DepthControl(NamedTuple):
    """How deep each of B sequences may think; `inference.dial.depth_control` makes one from depths
    in recursions.

    What the dial says is the policy's own language: under expert-choice entry r is the score z from
    which a token runs step r (instead of `depth.threshold`), under token-choice what is added to
    the log selection score of depth r. NaN leaves it to the configuration.
    """

    dial_BxR: jax.Array  # float32
    floor_B: jax.Array  # int32; a token runs at least so many recursions
    cap_B: jax.Array  # int32; and at most so many

    @classmethod
    def neutral(cls, rows: int, recursions: int) -> DepthControl:
        """The control that changes nothing."""
        return cls(
            jnp.full((rows, recursions), jnp.nan, jnp.float32),
            jnp.zeros((rows,), jnp.int32),
            jnp.full((rows,), recursions, jnp.int32),
        )


class Step(NamedTuple):
    """What one recursion step reads: the policy's own slice, its index from 0, and its column of
    the dial."""

    own: Any
    index: jax.Array  # type: ignore[assignment]  # not tuple.index
    dial_B: jax.Array


@dataclass(frozen=True, eq=False)
class Controlled(DepthPolicy):
    """`policy` under `control`, for causal inference. Not hashable: it lives within one trace."""

    policy: DepthPolicy
    control: DepthControl

    @property
    def recursions(self) -> int:  # type: ignore[override]  # a field of other policies
        return self.policy.recursions

    @property
    def reenters(self) -> bool:  # type: ignore[override]  # a class's word of other policies
        return self.policy.reenters

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        return self.policy.profiles(length)

    def steps(self, routers: Tree) -> Step:
        return Step(
            self.policy.steps(routers), jnp.arange(self.recursions), self.control.dial_BxR.T
        )

    def begin(self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo) -> Route:
        c, depth_BxT = self.control, info.depth_BxT
        if depth_BxT is None:
            depth_BxT = self.policy.depths(routers, h_BxTxD, info, c.dial_BxR)
        # clipped here and not in `select`: the exit step has a part of its own to play
        if depth_BxT is not None:
            depth_BxT = jnp.clip(depth_BxT, c.floor_B[:, None], c.cap_B[:, None])
        route = self.policy.begin(routers, h_BxTxD, info._replace(depth_BxT=depth_BxT))
        if depth_BxT is not None:
            route = route._replace(tokens=self.policy.recompute_gates(routers, route.tokens, *c))
        return route._replace(steps=Step(route.steps, jnp.arange(self.recursions), c.dial_BxR.T))

    def score(self, step: Step, h_BxTxD: jax.Array) -> jax.Array:
        return self.policy.score(step.own, h_BxTxD)

    def select(
        self,
        step: Step,
        z_BxT: jax.Array,
        candidates_BxT: jax.Array,
        tokens: Any,
        k: Any,
        dial: Any = None,
    ) -> jax.Array:
        if k is not None:
            raise ValueError(
                "a depth control is for causal inference; top-k selection fills its capacities"
            )
        wants = self.policy.select(
            step.own, z_BxT, candidates_BxT, tokens, None, step.dial_B[:, None]
        )
        must = step.index < self.control.floor_B[:, None]
        may = step.index < self.control.cap_B[:, None]
        return candidates_BxT & (must | (wants & may))

    def combine(
        self, step: Step, h: jax.Array, y: jax.Array, z: jax.Array, tokens: Any
    ) -> jax.Array:
        return self.policy.combine(step.own, h, y, z, tokens)

    def remember(self, h_BxTxD: jax.Array) -> Any:
        return self.policy.remember(h_BxTxD)

    def judge(
        self, step: Step, memory: Any, before: jax.Array, after: jax.Array
    ) -> tuple[jax.Array | None, Any]:
        goes_on, memory = self.policy.judge(step.own, memory, before, after)
        must = step.index + 1 < self.control.floor_B[:, None]
        return None if goes_on is None else goes_on | must, memory

    def finish(self, memory: Any, h_BxTxD: jax.Array) -> jax.Array:
        return self.policy.finish(memory, h_BxTxD)

    def finish_stats(self, memory: Any, real_BxT: jax.Array, stats: RouterStats) -> RouterStats:
        return self.policy.finish_stats(memory, real_BxT, stats)

    def step_stats(
        self, step: Step, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: Any
    ) -> RouterStats:
        return self.policy.step_stats(step.own, z, candidates, active, tokens)
