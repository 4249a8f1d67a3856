"""Training at varied depths: some steps run at another mean depth than the configured one.

A model trained at one set of capacities has learned one use of each depth: a token beyond its
capacity is never seen there, its gate has gone to zero, and turning the dial up changes next to
nothing. With `depth.vary` a share of the steps takes its capacities from the dial's own path
(`base.shares_at`), or under token-choice the dial itself, so that training goes to the places that
the dial will go to later. Each depth is a compiled program of its own, under expert-choice with
static sizes of its own; which one a step runs is a function of its number, spread evenly by the
golden ratio, so that a resumed run goes on alike. The survey of the scores rests in such steps, and
so does the balance of token-choice: thresholds are read off for the configured capacities, and the
load is not of the router's making.
"""

from __future__ import annotations

import math

import numpy as np

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.depth.base import shares_at
from mor_jax.model.program import tiled

_GOLDEN = (math.sqrt(5) - 1) / 2


def mean_depth(model: ModelConfig, depth: DepthConfig, index: int) -> float:
    """The varied depth of this index."""
    return float(np.linspace(1, model.recursions, depth.vary_depths)[index])


def varied_shares(model: ModelConfig, depth: DepthConfig, index: int) -> tuple[float, ...]:
    """Share of a row that runs recursion r = 1..R at the varied depth of this index. Token-choice
    is counted at the shares that expert-choice would have."""
    found = shares_at(depth.shares(model), mean_depth(model, depth, index), 0, model.recursions)
    if not depth.has_capacities:
        return tuple(round(float(s), 9) for s in found)
    # Rounded: all of a row is all, not all but one token.
    return tiled(tuple(round(float(s), 9) for s in found), model.context, depth.tile)


def varied(depth: DepthConfig, step: int) -> int | None:
    """Index of the depth that the warm optimiser step after `step` others trains at; None: the
    configured one."""
    place = (step * _GOLDEN) % 1.0
    return int(place / depth.vary * depth.vary_depths) if place < depth.vary else None


def mixture(model: ModelConfig, depth: DepthConfig) -> list[tuple[float, tuple[float, ...]]]:
    """(share of the steps, shares of a row) of everything that a warm run trains at."""
    own = [(1 - depth.vary, depth.shares(model))] if depth.vary < 1 else []
    if not depth.vary:
        return own
    each = depth.vary / depth.vary_depths
    return own + [(each, varied_shares(model, depth, i)) for i in range(depth.vary_depths)]
