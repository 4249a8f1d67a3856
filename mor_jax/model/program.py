"""The program: which block runs when, as static data.

    x -> prelude (own weights) -> core x R (shared weights) -> coda (own weights)

`none` and `cycle` have no prelude and coda; `middle_cycle` keeps the first and last layer unique (paper, table 1;
the scheme adopted for every Mixture-of-Recursions model there). A plain Transformer is R = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mor_jax.config import DepthConfig, ModelConfig, unshared_ends


@dataclass(frozen=True)
class Program:
    """Block counts of each part and the number of times the core is applied."""

    prelude: int
    core: int
    coda: int
    recursions: int

    @property
    def unique_layers(self) -> int:
        """Blocks with weights of their own."""
        return self.prelude + self.core + self.coda

    @property
    def unrolled_layers(self) -> int:
        """Block applications a token of full depth goes through."""
        return self.prelude + self.core * self.recursions + self.coda


def build_program(model: ModelConfig) -> Program:
    """The program of a checked model configuration (`config.check` refuses layer counts that do not divide)."""
    ends = unshared_ends(model.sharing)
    return Program(
        prelude=ends // 2,
        core=(model.layers - ends) // model.recursions,
        coda=ends - ends // 2,
        recursions=model.recursions,
    )


def capacities(model: ModelConfig, depth: DepthConfig) -> tuple[float, ...]:
    """Share of a row that runs recursion r = 1..R in training.

    All of it under the fixed policy; else `depth.capacities`, by default (R - r + 1) / R: the shares a perfectly
    balanced token-choice router would give (paper 2.2.1).
    """
    steps = model.recursions
    if depth.policy == "fixed":
        return (1.0,) * steps
    return depth.capacities or tuple((steps - r) / steps for r in range(steps))


def active_counts(shares: tuple[float, ...], length: int) -> tuple[int, ...]:
    """Tokens of a row of `length` at these shares: max(1, floor(c T)), as in the released code."""
    return tuple(max(1, math.floor(c * length)) for c in shares)
