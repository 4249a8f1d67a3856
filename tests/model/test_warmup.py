"""Depth warm-up: from full depth down to what is routed, counted as it runs, in steps that compile
one stage each."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.analysis import accounting
from mor_jax.config import Config, DepthConfig, ModelConfig, OptimConfig, TrainConfig
from mor_jax.model.depth.warmup import shares_in, stage_of, stages
from mor_jax.train.schedule import optimizer
from mor_jax.train.step import StagedStep

MODEL = ModelConfig(layers=8, recursions=3, sharing="middle_cycle", vocab_size=64, context=512)
EXPERT = DepthConfig("expert_choice", warmup=100, warmup_stages=5)


@pytest.mark.parametrize("count", [1, 3, 5, 100, 250])
def test_the_staircase_follows_the_curve(count):
    """The paper's c(t) = c + (1 - c)(1 + cos(pi t / W)) / 2: its mean exactly, its values to half a
    stride."""
    depth = dataclasses.replace(EXPERT, warmup_stages=count)
    walk = stages(MODEL, depth, 300)
    assert (
        [s.first for s in walk[1:]] == [s.last for s in walk[:-1]]
        and walk[0].first == 0
        and walk[-1].last == 300
    )
    assert len(walk) == min(count, 100) + 1 and walk[-1].index is None
    by_step = np.array([s.shares for s in walk for _ in range(s.last - s.first)])
    target = np.array([1, 2 / 3, 1 / 3])
    np.testing.assert_allclose(by_step[100:], np.tile(target, (200, 1)))
    curve = target + (1 - target) * (1 + np.cos(np.pi * (np.arange(100) + 0.5) / 100))[:, None] / 2
    np.testing.assert_allclose(by_step[:100].mean(0), curve.mean(0), atol=0.011)
    assert np.abs(by_step[:100] - curve).max() <= (1 - 1 / 3) * math.pi / 4 / min(count, 100) + 0.02
    assert (np.diff(by_step, axis=0) <= 1e-12).all()
    assert [stage_of(depth, t) for t in range(300)] == [
        s.index for s in walk for _ in range(s.last - s.first)
    ]


def test_what_a_warm_up_costs_is_counted_and_a_budget_pays_for_it():
    cfg = Config(model=MODEL, depth=EXPERT, train=TrainConfig(batch_size=4, flops=4e12))

    def per_step(shares):
        return 4 * 512 * accounting.paper_flops_per_token(MODEL, EXPERT, shares=shares)

    by_hand = sum(per_step(shares_in(MODEL, EXPERT, stage_of(EXPERT, t))) for t in range(130))
    assert accounting.paper_training_flops(cfg, 130) == pytest.approx(by_hand)
    cold = dataclasses.replace(cfg, depth=DepthConfig("expert_choice"))
    steps = accounting.training_steps(cfg)
    assert steps < accounting.training_steps(cold)
    assert accounting.paper_training_flops(cfg, steps) == pytest.approx(4e12, rel=0.01)
    assert (
        accounting.true_step_flops(cfg, 1)
        > accounting.true_step_flops(cfg, 60)
        > accounting.true_step_flops(cfg)
    )
    assert (
        accounting.true_step_flops(cfg, 101)
        == accounting.true_step_flops(cfg)
        == accounting.true_step_flops(cold)
    )
    assert accounting.true_training_flops(cfg, 130) == pytest.approx(
        sum(accounting.true_step_flops(cfg, t) for t in range(1, 131))
    )


def test_each_stage_is_a_program_and_the_warm_one_the_plain():
    lm = small_lm("mor")
    lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, warmup=6, warmup_stages=3))
    step = StagedStep(lm, optimizer(OptimConfig(), 10), 1)
    found = [step(t) for t in range(9)]
    assert [a is b for a, b in itertools.pairwise(found)] == [
        True,
        False,
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert dataclasses.replace(lm, stage=None) == lm and small_lm("mor").policy == lm.policy


def test_token_choice_warms_up_all_deep_with_its_balance_at_rest():
    lm = small_lm(
        "token", layers=3, sharing="cycle", width=16, heads=2, kv_heads=1, mlp_width=24, context=32
    )
    lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, warmup=2, bias_rate=0.01))
    params, tokens = random_params(lm), jax.random.randint(jax.random.key(0), (4, 32), 0, 64)
    cold = dataclasses.replace(lm, stage=stage_of(lm.depth, 1))
    run = {
        at: jax.jit(lambda p, at=at: at.forward(p, tokens, executor="masked"))(params)
        for at in (cold, lm)
    }
    assert (run[cold].depth_BxT == 3).all() and (run[lm].depth_BxT < 3).any()
    assert (
        cold.policy.profiles(32) == ((32, 32, 32),)
        and cold.policy.loss_weights()["router_loss"] == 0
    )
    moved = {at: at.policy.rebalance(params["router"], out.stats) for at, out in run.items()}
    np.testing.assert_array_equal(moved[cold]["bias"], params["router"]["bias"])
    assert np.abs(moved[lm]["bias"] - params["router"]["bias"]).max() == pytest.approx(
        0.01, rel=1e-3
    )
    # The router's own choices are surveyed all the same: the dial of the warm model is read off
    # them.
    np.testing.assert_allclose(run[cold].stats.above, run[lm].stats.above, atol=2)


def test_expert_choice_runs_as_many_tokens_as_its_stage_says():
    lm = small_lm(
        "mor", layers=3, sharing="cycle", width=16, heads=2, kv_heads=1, mlp_width=24, context=32
    )
    lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, warmup=30, warmup_stages=3))
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 64)
    for stage in (0, 2, None):
        at = dataclasses.replace(lm, stage=stage)
        out = jax.eval_shape(lambda p, at=at: at.forward(p, tokens).active_RxBxT, random_params(lm))
        assert out.shape == (3, 2, 32)
        shares = shares_in(lm.model, lm.depth, stage)
        assert at.policy.profiles(32) == (tuple(max(1, math.floor(c * 32)) for c in shares),)
    assert shares_in(lm.model, lm.depth, 0)[2] > shares_in(lm.model, lm.depth, 2)[2] > 1 / 3


def test_row_sizes_are_rounded_to_tiles():
    """Capacities to the nearest multiple, in training and in the accounting; token-choice's
    compiled sizes upwards."""
    model = dataclasses.replace(MODEL, context=2048)
    tiled = DepthConfig("expert_choice", tile=128)
    assert accounting.active_counts(model, tiled) == (2048, 1408, 640)  # of 2048, 1365, 682
    assert accounting.active_counts(model, dataclasses.replace(tiled, tile=512)) == (
        2048,
        1536,
        512,
    )
    assert accounting.active_counts(model, DepthConfig("expert_choice", tile=300)) == (
        2048,
        1500,
        600,
    )
    for context in range(3, 200):
        counts = accounting.active_counts(
            dataclasses.replace(model, context=context), DepthConfig("random", tile=3)
        )
        assert all(k % 3 == 0 or k == context for k in counts) and min(counts) >= 3
    from mor_jax.model.depth import build_policy

    for sizes in build_policy(model, DepthConfig("token_choice", tile=256)).profiles(2048):
        assert all(k % 256 == 0 for k in sizes)
    assert build_policy(model, tiled).profiles(2048) == ((2048, 1408, 640),)
