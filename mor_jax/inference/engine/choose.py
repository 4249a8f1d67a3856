"""How often the boundary comes: the throughput of a tick of m passes, by formula, from two measured
times.

N lanes, T_b seconds a core pass, T_h seconds a boundary, rho = T_h / T_b. A token of depth d takes
ceil(d / m) ticks (one at least, whatever its depth: it still leaves through a boundary), so

    X_m = N / (E[ceil(d / m)] (m T_b + T_h))

m = 1 is depth-wise batching; m = R lock-step, whose passes end when the deepest lane's do:
X = N / (E[max d] T_b + T_h), E[max d] = sum_r 1 - F(r - 1)^N over the steps r, F the distribution
of depths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.model.lm import LM


def shares(lm: LM, params: Any) -> tuple[float, ...]:
    """Share of tokens expected to run step r = 1..R: by the survey of a trained router under the
    causal rule, else by the capacities of training."""
    return lm.policy.expected_shares(params["router"])


def depth_distribution(shares_R: Sequence[float]) -> np.ndarray:
    """P(depth = 0..R) of shares that run each step."""
    at_least = np.concatenate([[1.0], np.minimum.accumulate(np.clip(shares_R, 0, 1)), [0.0]])
    return at_least[:-1] - at_least[1:]


def mean_depth(shares_R: Sequence[float]) -> float:
    """Expected recursions of a token."""
    return float(np.sum(shares_R))


def throughput(
    lanes: int, shares_R: Sequence[float], m: int, core_s: float, boundary_s: float
) -> float:
    """Tokens a second of ticks of m passes, all lanes busy."""
    p = depth_distribution(shares_R)
    steps = len(shares_R)
    if m == steps:
        deepest = sum(1 - p[:r].sum() ** lanes for r in range(1, steps + 1))
        return lanes / (deepest * core_s + boundary_s)
    ticks = sum(p[d] * max(math.ceil(d / m), 1) for d in range(steps + 1))
    return lanes / (ticks * (m * core_s + boundary_s))


def best(lanes: int, shares_R: Sequence[float], core_s: float, boundary_s: float) -> int:
    """The m of the highest throughput; the largest of several equal ones, which has the fewest
    boundaries."""
    found = {
        m: throughput(lanes, shares_R, m, core_s, boundary_s) for m in range(1, len(shares_R) + 1)
    }
    return max(found, key=lambda m: (round(found[m], 9), m))
