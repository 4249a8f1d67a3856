"""Depth warm-up: training starts at full depth and comes down to what is routed.

Expert-choice and random routing: the paper lets the capacity fall as c(t) = c + (1 - c) (1 + cos(pi
t / W)) / 2 over the first W steps (appendix G; it costs 0.008 nats there and is off by default).
Shapes are static, so here the curve is a staircase: `depth.warmup_stages` equal strides, each at
the curve's value in its middle, each a compiled program of its own. By the cosine's symmetry the
tokens computed over the warm-up are the curve's. After it the program is the one of a run without
warm-up.

Token-choice: every token runs to full depth, gated by its score for it; the balance loss and the
selection bias rest, since the load is not of the router's making.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.depth.vary import varied, varied_shares
from mor_jax.model.program import tiled


class Stage(NamedTuple):
    """Optimiser steps first + 1 .. last of a run, at one set of shares."""

    # of the stage; None: warm
    index: int | None  # type: ignore[assignment]  # not tuple.index
    first: int
    last: int
    shares: tuple[float, ...]  # of a row that runs recursion r = 1..R


def stage_count(depth: DepthConfig) -> int:
    """Stages before the run is warm."""
    if not depth.warmup:
        return 0
    return min(depth.warmup_stages, depth.warmup) if depth.has_capacities else 1


def is_warm(depth: DepthConfig, stage: int | None) -> bool:
    """Whether a stage comes after the warm-up."""
    return stage is None or stage >= stage_count(depth)


def shares_in(model: ModelConfig, depth: DepthConfig, stage: int | None) -> tuple[float, ...]:
    """Share of a row that runs recursion r = 1..R in this stage; None: once warm. Stages after
    those of the warm-up are the varied depths of a warm run (`depth/vary.py`)."""
    if stage is None:
        return depth.shares(model)
    if is_warm(depth, stage):
        return varied_shares(model, depth, stage - stage_count(depth))
    if not depth.has_capacities:
        return (1.0,) * model.recursions
    ease = (1 + math.cos(math.pi * (stage + 0.5) / stage_count(depth))) / 2
    return tiled(tuple(c + (1 - c) * ease for c in depth.shares(model)), model.context, depth.tile)


def stages(model: ModelConfig, depth: DepthConfig, steps: int) -> tuple[Stage, ...]:
    """The stages that a run of `steps` goes through, in order; the last is warm unless the run ends
    before."""
    count, found = stage_count(depth), []
    ends = [depth.warmup * (i + 1) // count for i in range(count)]
    for i, (first, last) in enumerate(
        zip([0, *ends], [*ends, max(steps, depth.warmup)], strict=True)
    ):
        if first < min(last, steps):
            index = i if i < count else None
            found.append(Stage(index, first, min(last, steps), shares_in(model, depth, index)))
    return tuple(found)


def stage_of(depth: DepthConfig, step: int) -> int | None:
    """Stage of the optimiser step after `step` others; None: warm, at the configured capacities."""
    count = stage_count(depth)
    if step >= depth.warmup:
        index = varied(depth, step)
        return None if index is None else count + index
    return next(i for i in range(count) if step < depth.warmup * (i + 1) // count)
