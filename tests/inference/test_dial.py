"""Depth as a dial: the survey is the scores' distribution, the dial hits what was asked, and
nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import random_params, small_lm, spread_routers

from mor_jax.config import OptimConfig
from mor_jax.errors import UserError
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.inference.dial import calibrate, depth_control, has_survey
from mor_jax.inference.generate import Generation
from mor_jax.model.depth import DepthControl, ExpertChoice, TokenChoice, TokenInfo, survey
from mor_jax.model.depth.base import shares_at
from mor_jax.model.depth.token_choice import pull_deeper
from mor_jax.train.schedule import optimizer
from mor_jax.train.state import TrainState
from mor_jax.train.step import make_train_step

R, T = 3, 64
EXPERT = ExpertChoice(
    recursions=R, width=8, capacities=(1.0, 2 / 3, 1 / 3), alpha=0.1, threshold=0.5, init_std=0.02
)
TOKEN = TokenChoice(recursions=R, width=8, alpha=0.5, init_std=0.02)


def counts(z, who=None):
    return np.asarray(
        survey.count_above(
            jnp.asarray(z), jnp.ones(z.shape, bool) if who is None else jnp.asarray(who)
        )
    )


# ---------------------------------------------------------------- the survey


@given(
    centre=st.floats(-6, 6),
    width=st.floats(0.05, 4),
    gap=st.floats(0, 8),
    share=st.floats(0.02, 0.98),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_the_threshold_read_off_lets_the_share_through(centre, width, gap, share, seed):
    """One mode or two with nothing between them, anywhere, of any width that the probes, 7 % apart,
    can resolve."""
    assume(width >= 0.1 * (abs(centre) + gap))
    rng = np.random.default_rng(seed)
    z = (centre + width * rng.normal(size=(8, 500)) + gap * (rng.random((8, 500)) < 1 / 3)).astype(
        np.float32
    )
    threshold = survey.score_reached_by(share, survey.reach(counts(z)[None])[0])
    assert abs((z >= threshold).mean() - share) < 0.03


def test_the_running_survey_follows_what_it_sees():
    """After a few hundred batches of another distribution the old one is forgotten; uncounted
    scores never count."""
    rng = np.random.default_rng(0)
    kept = survey.empty(1)
    step = jax.jit(survey.updated)
    for i in range(800):
        z = rng.normal(loc=-3 if i < 200 else 1, size=(2, 100)).astype(np.float32)
        who = rng.random((2, 100)) < 0.7
        kept = step(kept, counts(np.where(who, z, 99), who)[None])
    reach = survey.reach(kept)[0]
    for share in (0.1, 0.5, 0.9):
        exact = 1 - np.sqrt(2) * float(jax.scipy.special.erfinv(2 * share - 1))
        assert survey.score_reached_by(share, reach) == pytest.approx(exact, abs=0.1)
    empty_batch = step(kept, np.zeros((1, len(survey.PROBES_G)), np.float32))
    np.testing.assert_array_equal(empty_batch, kept)
    assert (
        survey.score_reached_by(1.0, reach) == -np.inf
        and survey.score_reached_by(0.0, reach) == np.inf
    )


# ---------------------------------------------------------------- what is asked is hit, on made-up
# scores


def expert_depths(z_RxN, thresholds):
    return np.cumprod(z_RxN >= thresholds[:, None], axis=0).sum(0)


@settings(max_examples=30)
@given(
    mean=st.floats(0.1, 3.0),
    floor=st.integers(0, 1),
    cap=st.integers(1, 3),
    seed=st.integers(0, 50),
)
def test_expert_choice_hits_the_mean_depth(mean, floor, cap, seed):
    """Although a token's scores at the steps depend on each other, and only training's candidates
    were surveyed."""
    mean = min(max(mean, floor), cap)
    rng = np.random.default_rng(seed)
    common = rng.normal(size=4000)
    z = (
        rng.normal(size=(R, 4000)) + rng.uniform(-2, 2, (R, 1)) * common + rng.normal(size=(R, 1))
    ).astype(np.float32)
    inside, taken = np.ones(4000, bool), []
    for r, share in enumerate(EXPERT.capacities):
        taken.append(counts(z[r][None], inside[None]))
        inside &= z[r] >= np.sort(z[r][inside])[::-1][int(share * 4000) - 1]
    thresholds = EXPERT.dial(np.stack(taken), mean, floor, cap)
    depth = expert_depths(z, thresholds)
    assert depth.max() <= cap
    assert abs(depth.mean() - mean) < 0.05


@given(
    mean=st.floats(1.0, 3.0),
    floor=st.integers(0, 2),
    cap=st.integers(2, 3),
    seed=st.integers(0, 50),
)
@settings(max_examples=30)
def test_token_choice_hits_the_mean_depth(mean, floor, cap, seed):
    mean = min(max(mean, floor), cap)
    rng = np.random.default_rng(seed)
    selection = np.asarray(
        jax.nn.softmax(rng.normal(size=(1, 4000, R)) + 2 * rng.normal(size=R), axis=-1), np.float32
    )
    pulls = pull_deeper(jnp.log(selection))
    taken = np.stack([counts(np.asarray(p)) for p in pulls])
    dial = TOKEN.dial(taken, mean, floor, cap)
    assert (dial[0] == 0) and np.allclose(dial, dial[1] * np.arange(R))
    depth = np.clip(np.argmax(np.log(selection) + dial, axis=-1) + 1, floor, cap)
    assert abs(depth.mean() - mean) < 0.05


def test_shares_pass_through_training_and_never_widen():
    for mean in np.linspace(0, 3, 31):
        share = shares_at(EXPERT.capacities, mean, 0, 3)
        assert share.sum() == pytest.approx(mean)
        assert (np.diff(share) <= 1e-9).all() and share.min() >= 0 and share.max() <= 1
    np.testing.assert_allclose(shares_at(EXPERT.capacities, 2.0, 0, 3), EXPERT.capacities)
    np.testing.assert_allclose(shares_at(EXPERT.capacities, 3.0, 0, 3), 1)
    np.testing.assert_allclose(shares_at(EXPERT.capacities, 1.0, 0, 3), [1, 0, 0], atol=1e-9)


# ---------------------------------------------------------------- models


@functools.cache
def model(kind):
    lm = small_lm(kind, context=T)
    params = spread_routers(random_params(lm))
    rows = jax.random.randint(jax.random.key(9), (8, T), 0, 64)
    if kind != "recursive":
        params = calibrate(lm, params, [{"tokens": rows, "segment_ids": jnp.ones_like(rows)}])
    return lm, params


@functools.partial(jax.jit, static_argnums=0)
def causal(lm, params, tokens, control):
    out = lm.forward(params, tokens, mode="causal", control=control)
    return lm.logits(params, out.h_BxTxD), out.depth_BxT


def mixed_control(kind, lm, params):
    """Three sequences under three controls."""
    mean = [1.4, None, 2.3] if kind != "recursive" else None
    return depth_control(
        lm, params, 3, mean_depth=mean, min_depth=[None, 2, 1], max_depth=[2, None, 3]
    )


KINDS = ("recursive", "mor", "token_every")


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_the_full_pass_under_control(kind):
    lm, params = model(kind)
    control = mixed_control(kind, lm, params)
    tokens = jax.random.randint(jax.random.key(1), (3, T), 0, 64)
    want, depth = map(np.asarray, causal(lm, params, tokens, control))
    assert depth[0].max() <= 2 and depth[1].min() >= 2 and depth[2].min() >= 1
    lengths, rows = np.array([7, 12, 20]), np.arange(3)
    logits, cache, _ = jax.jit(prefill, static_argnums=(0, 4))(
        lm, params, tokens[:, :20], jnp.asarray(lengths), T, control
    )
    np.testing.assert_allclose(logits, want[rows, lengths - 1], atol=1e-4)
    step = jax.jit(functools.partial(decode_step, lm))
    for i in range(40):
        logits, cache, d = step(params, cache, tokens[rows, lengths + i], control)
        np.testing.assert_allclose(logits, want[rows, lengths + i], atol=1e-4)
        np.testing.assert_array_equal(d, depth[rows, lengths + i])


@pytest.mark.parametrize("kind", KINDS)
def test_causal_rowwise_and_neutral(kind):
    lm, params = model(kind)
    control = mixed_control(kind, lm, params)
    tokens = jax.random.randint(jax.random.key(2), (3, T), 0, 64)
    got = np.asarray(causal(lm, params, tokens, control)[0])
    # Nothing looks ahead ...
    changed = tokens.at[:, 30:].set((tokens[:, 30:] + 5) % 64)
    np.testing.assert_array_equal(
        np.asarray(causal(lm, params, changed, control)[0])[:, :30], got[:, :30]
    )
    # ... a control is its own row's alone ...
    other = jax.tree.map(
        lambda x, y: jnp.where((jnp.arange(3) > 0).reshape(3, *(1,) * (x.ndim - 1)), y, x),
        control,
        DepthControl.neutral(3, R),
    )
    np.testing.assert_array_equal(np.asarray(causal(lm, params, tokens, other)[0])[0], got[0])
    # ... and the neutral one changes no bit.
    plain, neutral = (
        causal(lm, params, tokens, None),
        causal(lm, params, tokens, DepthControl.neutral(3, R)),
    )
    for a, b in zip(plain, neutral, strict=True):
        np.testing.assert_array_equal(a, b)
    # None of the three controls was compiled for.
    assert causal._cache_size() <= 2 * len(KINDS)


@pytest.mark.parametrize("kind", ["mor", "token"])
def test_a_calibrated_model_hits_the_mean_depth(kind):
    """On the rows it was calibrated with: these small models read noise, of which no other sample
    is alike."""
    lm, params = model(kind)
    tokens = jax.random.randint(jax.random.key(9), (8, T), 0, 64)
    for mean in (1.0, 1.5, 2.0, 2.5, 3.0):
        depth = causal(lm, params, tokens, depth_control(lm, params, 8, mean_depth=mean))[1]
        assert float(depth.mean()) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("kind", ["mor", "token_every"])
def test_training_keeps_the_survey(kind):
    """By rule alone: neither the optimiser nor its decay moves it; accumulation does not change
    it."""
    lm = small_lm(kind, context=T)
    params = random_params(lm)
    params["router"]["survey"] = survey.empty(R)
    tx = optimizer(OptimConfig(weight_decay=0.5), 10)
    tokens = jax.random.randint(jax.random.key(0), (4, 32), 0, 64)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    assert not has_survey(params)
    found = [jax.jit(make_train_step(lm, tx, accum))(state, batch)[0].params for accum in (1, 2)]
    one, two = (np.asarray(p["router"]["survey"]) for p in found)
    assert has_survey(found[0])
    # A score beside a probe may fall on either side.
    np.testing.assert_allclose(one, two, atol=(1 - survey.DECAY) * 1.5 / 128)
    share = lm.policy.capacities if kind == "mor" else (1.0, 1.0, 1.0)
    candidates = (1.0, *(int(c * 32) / 32 for c in share[:-1]))
    np.testing.assert_allclose(one[:, 0], (1 - survey.DECAY) * np.asarray(candidates), rtol=1e-5)
    assert (np.diff(one, axis=1) <= 1e-9).all()


def test_generation_obeys_its_control():
    lm, params = model("mor")
    run = Generation(
        lm,
        params,
        [[5, 9, 2], [3]],
        max_tokens=8,
        control=depth_control(lm, params, 2, max_depth=[1, 3]),
    )
    depths = np.stack([g.previous_depth_B for g in run])
    assert depths[:, 0].max() <= 1 and run.prompt_depths[0].max() <= 1


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("kind", "wish", "message"),
    [
        ("mor", {"mean_depth": 3.5}, "mean depth of 3.5 is out of reach.*between 0 and 3"),
        ("token_every", {"mean_depth": 0.5}, "between 1 and 3"),
        ("mor", {"mean_depth": 2.5, "max_depth": 2}, "between 0 and 2"),
        ("mor", {"mean_depth": 1.5, "min_depth": 2}, "between 2 and 3"),
        ("mor", {"mean_depth": float("nan")}, "must be a number"),
        ("mor", {"max_depth": 4}, "maximum depth must be a whole number from 1 to 3"),
        ("mor", {"max_depth": 0}, "maximum depth"),
        ("mor", {"min_depth": -1}, "minimum depth"),
        ("mor", {"min_depth": 3, "max_depth": 2}, "above the maximum"),
        ("mor", {"mean_depth": [1.0, 2.0, 3.0]}, "3 depths were given for 2"),
        ("recursive", {"mean_depth": 2.0}, "nothing|no mean depth to dial"),
    ],
)
def test_impossible_depths_are_named(kind, wish, message):
    lm, params = model(kind)
    with pytest.raises(UserError, match=message):
        depth_control(lm, params, 2, **wish)


def test_without_a_survey_there_is_no_dial():
    lm, params = model("mor")
    blank = params | {"router": params["router"] | {"survey": survey.empty(R)}}
    with pytest.raises(UserError, match="carries no survey"):
        depth_control(lm, blank, 1, mean_depth=2.0)
    recursive, its_params = model("recursive")
    with pytest.raises(UserError, match="no router scores"):
        calibrate(recursive, its_params, [{}])
    with pytest.raises(ValueError, match="causal"):
        lm.forward(params, jnp.zeros((1, 4), jnp.int32), control=DepthControl.neutral(1, R))


# ---------------------------------------------------------------- token-choice whose router has
# decided


@functools.cache
def decided(spread=25.0):
    """(routers, states): logits so far apart that all scores but one are zero in float32; the
    states are the logits."""
    z = spread * np.random.default_rng(5).normal(size=(4, 500, R)).astype(np.float32)
    h = jnp.concatenate([jnp.asarray(z), jnp.zeros((4, 500, 5))], axis=-1)
    shapes = jax.eval_shape(TOKEN.init, jax.random.key(0))
    routers = {"choice": jax.tree.map(lambda leaf: jnp.eye(*leaf.shape), shapes["choice"])}
    pulls = pull_deeper(jax.nn.log_softmax(z))
    return routers | {"survey": jnp.stack([counts(np.asarray(p)) for p in pulls])}, h


@pytest.mark.parametrize("mean", [1.0, 1.4, 2.0, 2.6, 3.0])
def test_a_decided_router_is_dialled_token_by_token(mean):
    routers, h = decided()
    dial = jnp.broadcast_to(
        jnp.asarray(TOKEN.dial(np.asarray(routers["survey"]), mean, 0, R)), (4, R)
    )
    info = TokenInfo(jnp.ones(h.shape[:2], bool), jnp.zeros(h.shape[:2], jnp.int32))
    depth = TOKEN.depths(routers, h, info, dial)
    assert float(depth.mean()) == pytest.approx(mean, rel=0.02)
    route = TOKEN.begin(routers, h, info._replace(depth_BxT=depth))
    bounds = jnp.full((4,), 0), jnp.full((4,), R)
    gate = TOKEN.recompute_gates(routers, route.tokens, dial, *bounds).gate_BxT
    # alpha times the largest of three: nobody comes back as it went in
    assert float(gate.min()) >= 0.5 / 3 - 1e-6
    same = TOKEN.recompute_gates(routers, route.tokens, jnp.full((4, R), jnp.nan), *bounds).gate_BxT
    # without a dial, the score the router gave
    np.testing.assert_array_equal(same, route.tokens.gate_BxT)
    # And training under the dial goes where the dial goes.
    varied = dataclasses.replace(TOKEN, mean_depth=mean).begin(routers, h, info).tokens
    np.testing.assert_array_equal(varied.depth_BxT, depth)
    np.testing.assert_allclose(varied.gate_BxT, gate, atol=1e-6)


def test_a_cap_leaves_the_gate_to_the_depths_that_are_left():
    routers, h = decided(1.0)
    info = TokenInfo(jnp.ones(h.shape[:2], bool), jnp.zeros(h.shape[:2], jnp.int32))
    depth = jnp.minimum(TOKEN.depths(routers, h, info), 2)
    tokens = TOKEN.begin(routers, h, info._replace(depth_BxT=depth)).tokens
    gate = TOKEN.recompute_gates(
        routers, tokens, jnp.full((4, R), jnp.nan), jnp.full((4,), 0), jnp.full((4,), 2)
    ).gate_BxT
    score = jax.nn.softmax(h[..., :2])
    np.testing.assert_allclose(
        gate,
        TOKEN.alpha * jnp.take_along_axis(score, depth[..., None] - 1, axis=-1)[..., 0],
        atol=1e-6,
    )
