"""Training at varied depths: which step runs at which depth, what it costs, and that the survey
rests in it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.analysis import accounting
from mor_jax.config import Config, DepthConfig, ModelConfig, OptimConfig, TrainConfig, check
from mor_jax.errors import ConfigError
from mor_jax.model.depth import survey
from mor_jax.model.depth.histogram import BINS, EDGES, histogram
from mor_jax.model.depth.survey import PROBES_G
from mor_jax.model.depth.vary import mixture, varied
from mor_jax.model.depth.warmup import shares_in, stage_of
from mor_jax.train.schedule import optimizer
from mor_jax.train.state import TrainState
from mor_jax.train.step import StagedStep

MODEL = ModelConfig(layers=8, recursions=3, sharing="middle_cycle", vocab_size=64, context=64)
DEPTH = DepthConfig(policy="expert_choice", vary=0.5, vary_depths=5)


def test_steps_are_spread_evenly_over_the_depths():
    """Over any stretch of a few dozen steps, not only in the long run."""
    for start in (0, 777):
        found = collections.Counter(varied(DEPTH, step) for step in range(start, start + 200))
        assert found.pop(None) == pytest.approx(100, abs=3)
        assert sorted(found) == [0, 1, 2, 3, 4]
        assert all(count == pytest.approx(20, abs=3) for count in found.values())


def test_depths_go_evenly_from_one_to_all():
    parts = mixture(MODEL, DEPTH)
    assert sum(part for part, _ in parts) == pytest.approx(1)
    assert parts[0] == (0.5, (1.0, 2 / 3, 1 / 3))
    np.testing.assert_allclose([sum(shares) for _, shares in parts[1:]], [1, 1.5, 2, 2.5, 3])
    assert all((np.diff(shares) <= 1e-9).all() for _, shares in parts)
    # the path passes through the configured capacities
    np.testing.assert_allclose(parts[3][1], parts[0][1])
    assert mixture(MODEL, DepthConfig(policy="expert_choice")) == [(1.0, (1.0, 2 / 3, 1 / 3))]


def test_the_count_of_flops_is_that_of_the_steps():
    warm = dataclasses.replace(DEPTH, warmup=20)
    cfg = Config(model=MODEL, depth=warm, train=TrainConfig(steps=2000, batch_size=4))
    check(cfg)

    def of(step):
        return accounting.paper_flops_per_token(
            MODEL, warm, shares=shares_in(MODEL, warm, stage_of(warm, step))
        )

    by_hand = accounting.tokens_per_step(cfg) * sum(of(step) for step in range(2000))
    assert accounting.paper_training_flops(cfg, 2000) == pytest.approx(by_hand, rel=2e-3)
    budget = dataclasses.replace(cfg, train=TrainConfig(flops=by_hand, batch_size=4))
    assert accounting.training_steps(budget) == pytest.approx(2000, rel=2e-3)


def test_a_varied_step_trains_at_its_depth_and_leaves_the_survey():
    lm = small_lm("mor", context=16, layers=5)
    lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, vary=0.9, vary_depths=2))
    params = random_params(lm)
    params["router"]["survey"] = survey.empty(3)
    tx = optimizer(OptimConfig(), 10)
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    steps = StagedStep(lm, tx, 1)
    depths = {}
    for index in (0, 1):  # mean depths 1 and 3
        number = next(step for step in range(50) if varied(lm.depth, step) == index)
        before = params["embed"]["table"].copy()
        state = jax.tree.map(
            jnp.copy, TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
        )
        state, metrics = steps(number)(state, batch)
        depths[index] = float(metrics["mean_depth"])
        assert not np.any(state.params["router"]["survey"])
        assert np.any(state.params["embed"]["table"] != before)
        assert steps(number) is steps(number)  # it comes again, and is not compiled again
    # at least one token runs every step
    assert depths[0] == pytest.approx(1 + 2 / 16) and depths[1] == 3


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (
            {"policy": "fixed", "vary": 0.5},
            "vary = 0.5 varies what is routed, but policy 'fixed' routes nothing",
        ),
        ({"policy": "expert_choice", "vary": 1.5}, "must be in \\[0, 1\\]"),
        ({"policy": "expert_choice", "vary": 0.5, "vary_depths": 1}, "give at least 2"),
    ],
)
def test_contradictions_are_named(depth, message):
    with pytest.raises(ConfigError, match=message):
        check(Config(model=MODEL, depth=DepthConfig(**depth), train=TrainConfig(steps=1)))


def test_histograms_are_those_of_the_scores():
    """Against numpy's own, at the very edges; and they lie where even steps of the sigmoid are."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(-4, 1, 900), rng.normal(3, 0.5, 600), [-50.0, 50.0]]).astype(
        np.float32
    )
    above = survey.count_above(jnp.asarray(z[None]), jnp.ones((1, len(z)), bool))
    got = np.asarray(histogram(jnp.stack([above, jnp.zeros_like(above)])))
    want = np.histogram(
        z.astype(np.float64), bins=[-np.inf, *PROBES_G[EDGES].astype(np.float64), np.inf]
    )[0]
    np.testing.assert_allclose(got[0], want / len(z), atol=1e-6)
    assert not got[1].any()
    np.testing.assert_allclose(
        1 / (1 + np.exp(-PROBES_G[EDGES])), np.arange(1, BINS) / BINS, atol=0.02
    )
