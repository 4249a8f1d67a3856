"""Token-choice: the two readings of its gate, its balance, and how the selection bias moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.config import DepthConfig
from mor_jax.model.depth import RouterStats, TokenChoice
from mor_jax.model.depth.token_choice import load_shares

R, D = 3, 8


def policy(**options) -> TokenChoice:
    return TokenChoice(**{"recursions": R, "width": D, "alpha": 0.7, "init_std": 0.5} | options)


def by_hand(p: TokenChoice, routers, h, core):
    """One token at a time, straight from the paper's words."""
    out, depths = [], []
    for x in h:
        z = np.asarray(routers["choice"]["kernel"]) @ x / p.temperature
        score = np.exp(z) / np.exp(z).sum() if p.score_name == "softmax" else 1 / (1 + np.exp(-z))
        depth = int(np.argmax(p.alpha * score + np.asarray(routers.get("bias", 0.0)))) + 1
        gate, state = p.alpha * score[depth - 1], x
        for r in range(1, depth + 1):
            y = core(state)
            exit_term = x if r == depth else 0
            gated = p.gate == "every" or r == depth
            state = (gate * y if gated else y) + exit_term
        out.append(state)
        depths.append(depth)
    return np.array(out), depths


@pytest.mark.parametrize("gate", ["exit", "every"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("bias_rate", [0.0, 0.1])
def test_gate_and_choice_are_the_ones_written_down(gate, score, bias_rate):
    p = policy(gate=gate, score_name=score, bias_rate=bias_rate, temperature=1.5)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(D, D)) * 0.4
    h = rng.normal(size=(1, 20, D)).astype(np.float32) * 2
    routers = {"choice": {"kernel": jnp.asarray(rng.normal(size=(R, D)), jnp.float32)}}
    if bias_rate:
        routers["bias"] = jnp.asarray([0.3, -0.1, 0.0])
    from mor_jax.model.recurse import run_gathered, run_masked

    def core(x, pos, q_seg, kv_seg):
        return (jnp.tanh(x @ jnp.asarray(w, jnp.float32)), None)

    pos, seg = jnp.arange(20)[None], jnp.ones((1, 20), jnp.int32)
    want, depths = by_hand(p, routers, h[0], lambda x: np.tanh(x @ w))
    assert len(set(depths)) == R
    for run in (
        run_gathered,
        lambda *a: run_masked(*a, causal=True),
        lambda *a: run_masked(*a, causal=False),
    ):
        got = run(p, routers, core, jnp.asarray(h), pos, seg)
        np.testing.assert_array_equal(got.depth_BxT[0], depths)
        np.testing.assert_allclose(got.h_BxTxD[0], want, atol=1e-5)


def stats(depth_counts, mean_scores) -> RouterStats:
    n = float(sum(depth_counts))
    ran = np.cumsum(np.asarray(depth_counts, np.float32)[::-1])[::-1]
    zeros = RouterStats(*(jnp.zeros((R,), jnp.float32),) * 8)
    return zeros._replace(
        candidates=jnp.full((R,), n),
        selected=jnp.asarray(ran),
        score=jnp.asarray(mean_scores, jnp.float32) * n,
    )


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_balance_loss_is_alpha_when_balanced_and_grows_towards_r_times_alpha(alpha):
    """The released code sums the scaled scores, alpha * sigmoid(z) or softmax(z)."""
    p = policy(alpha=alpha)

    def totals(counts):
        return jnp.full((R,), float(sum(counts)))

    def loss(counts, scores):
        return float(p.losses(stats(counts, scores), totals(counts))["router_loss"])

    assert loss([10, 10, 10], [1 / 3] * 3) == pytest.approx(alpha)
    assert loss([30, 0, 0], [1.0, 0.0, 0.0]) == pytest.approx(alpha * R)
    assert alpha < loss([20, 5, 5], [0.6, 0.2, 0.2]) < alpha * R


@pytest.mark.parametrize(
    ("depth", "scale"),
    [
        ({"policy": "expert_choice"}, 0.1),
        ({"policy": "expert_choice", "score": "none"}, 1.0),
        ({"policy": "expert_choice", "score": "none", "alpha": 0.3}, 0.3),
        ({"policy": "token_choice"}, 1.0),
        ({"policy": "token_choice", "score": "sigmoid"}, 0.1),
    ],
)
def test_the_gate_is_scaled_as_in_the_released_code(depth, scale):
    assert DepthConfig(**depth).gate_scale == scale


def test_the_bias_moves_towards_the_depths_that_are_too_rare():
    p = policy(bias_rate=0.01)
    before = {"choice": {}, "bias": jnp.asarray([0.5, 0.0, -0.5])}
    after = p.rebalance(before, stats([20, 10, 0], [0.5, 0.3, 0.2]))["bias"]
    np.testing.assert_allclose(after - before["bias"], [-0.01, 0.0, 0.01], atol=1e-7)
    np.testing.assert_allclose(
        load_shares(stats([20, 10, 0], [0.5, 0.3, 0.2])), [2 / 3, 1 / 3, 0], atol=1e-6
    )


def test_training_steps_move_the_bias_by_rule_alone():
    """The optimiser never touches it: after n steps every entry is a whole number of rates away
    from where it was."""
    import optax

    from mor_jax.config import OptimConfig
    from mor_jax.train.schedule import optimizer
    from mor_jax.train.state import TrainState
    from mor_jax.train.step import make_train_step

    lm = small_lm("token")
    lm = dataclasses.replace(
        lm, depth=dataclasses.replace(lm.depth, bias_rate=0.01, balance_loss_weight=0.0)
    )
    params = random_params(lm)
    start = np.asarray(params["router"]["bias"])
    tx = optimizer(OptimConfig(weight_decay=0.5), 10)
    step = jax.jit(make_train_step(lm, tx, accum=2))
    tokens = jax.random.randint(jax.random.key(0), (4, 32), 0, 64)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    for _ in range(3):
        state, metrics = step(state, {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)})
    moved = (np.asarray(state.params["router"]["bias"]) - start) / 0.01
    np.testing.assert_allclose(moved, np.round(moved), atol=1e-3)
    assert np.abs(moved).max() >= 1 and np.abs(moved).max() <= 3
    assert (
        optax.global_norm(
            jax.tree.map(jnp.subtract, state.params["router"]["choice"], params["router"]["choice"])
        )
        > 0
    )
    assert (
        float(metrics["router/max_vio"]) >= 0
        and 0 <= float(metrics["router/entropy"]) <= np.log(3) + 1e-6
    )
    assert sum(float(metrics[f"router/{r}/load"]) for r in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
