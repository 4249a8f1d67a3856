"""Throughput by formula: against a simulation of lanes, and the choice of m by it."""

import math

import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.inference.engine import choose

UNIFORM, FRONT = (1.0, 2 / 3, 1 / 3), (1.0, 0.5, 0.2)


def simulated(
    lanes: int, shares, m: int, core_s: float, boundary_s: float, tokens: int = 12_000
) -> float:
    """Tokens a second of lanes whose tokens have random depths, tick by tick."""
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.choice(len(shares) + 1, size=n, p=choose.depth_distribution(shares))

    left, done, seconds = draw(lanes), 0, 0.0
    while done < tokens:
        ran = min(m, int(left.max()))
        left = np.maximum(left - m, 0)
        seconds += (ran if m == len(shares) else m) * core_s + boundary_s
        out = left == 0
        done += int(out.sum())
        left[out] = draw(int(out.sum()))
    return done / seconds


@pytest.mark.parametrize("shares", [UNIFORM, FRONT, (0.8, 0.6, 0.6)])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_throughput_is_that_of_a_simulation(shares, m):
    for rho in (0.2, 1.5):
        by_formula = choose.throughput(8, shares, m, 1.0, rho)
        assert by_formula == pytest.approx(simulated(8, shares, m, 1.0, rho), rel=0.03)


def test_published_gains_of_depth_wise_over_lock_step():
    """(E[max] + rho) / (E[d] (1 + rho)) with E[max] = R, many lanes: 1.5, 1.3 and 1 for uniform
    depths."""
    for rho, gain in ((0.0, 1.5), (0.25, 1.3), (1.0, 1.0)):
        ratio = choose.throughput(1000, UNIFORM, 1, 1.0, rho) / choose.throughput(
            1000, UNIFORM, 3, 1.0, rho
        )
        assert ratio == pytest.approx(gain)


def test_the_boundary_decides():
    assert choose.best(32, UNIFORM, 1.0, 0.1) == 1
    assert choose.best(32, UNIFORM, 1.0, 3.0) == 3
    assert choose.best(32, (1.0,), 1.0, 1.0) == 1
    # every token is deep: as few boundaries as can be
    assert choose.best(32, (1.0, 1.0, 1.0), 1.0, 0.5) == 3


def test_shares_come_from_the_survey_or_else_from_training():
    lm = small_lm("mor")
    params = random_params(lm)
    empty = params | {
        "router": params["router"] | {"survey": np.zeros_like(params["router"]["survey"])}
    }
    assert choose.shares(lm, empty) == pytest.approx(UNIFORM)
    reach = np.linspace(1.0, 0.0, params["router"]["survey"].shape[1])
    reach[0] = 1.0
    half = params | {"router": params["router"] | {"survey": np.stack([reach] * 3)}}
    found = choose.shares(lm, half)
    assert found[0] == pytest.approx(0.5, abs=0.02) and found[1] == pytest.approx(found[0] ** 2)
    assert choose.mean_depth(found) == pytest.approx(sum(found))
    assert choose.shares(small_lm("recursive"), {"router": {}}) == (1.0,) * 3
    # a survey may be noisy
    assert math.isclose(choose.depth_distribution((1.5, 0.5, 0.7)).sum(), 1.0)
