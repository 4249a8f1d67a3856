"""The knobs of `config.recursion`: identities between them, decoding, causality, and what is
refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params

from mor_jax.config import (
    Config,
    DepthConfig,
    ModelConfig,
    RecursionConfig,
    TrainConfig,
    check,
    from_dict,
)
from mor_jax.config.recursion import KNOBS, choices
from mor_jax.errors import ConfigError, UserError
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.model.lm import LM, Forward
from mor_jax.model.recursion import exit as exit_rules
from mor_jax.model.recursion import injection
from mor_jax.model.recursion.exit import Reader
from mor_jax.model.recursion.loss import divergence, log_prior, log_stopping, step_weights
from mor_jax.model.recursion.sampling import draw
from mor_jax.train.loops import loop_loss
from mor_jax.train.step import gradients, loss_fn, loss_scales

T = 12
MODEL = ModelConfig(
    layers=4,
    recursions=3,
    sharing="cycle",
    prelude=1,
    coda=0,
    width=16,
    heads=2,
    kv_heads=1,
    mlp_width=24,
    vocab_size=32,
    context=T,
    init_std=0.3,
)
TOLERANCE = 1e-4  # float32 of order 10: other shapes, other summation order
# Every value of every knob of a step appears in one of these.
READS = {
    "random": {"state": "random", "injection": "concat"},
    "drawn": {"state": "drawn", "injection": "add", "inner": 1},
    "const": {"state": "const", "injection": "diagonal", "conditioning": "learned"},
    "zeros": {"state": "zeros", "injection": "add", "conditioning": "sinusoid", "loop_norm": True},
    "channel": {"injection": "channel", "conditioning": "time"},
}
EXITS = {
    "latent": {"exit": "latent", "exit_threshold": 0.35},
    "cosine": {"exit": "cosine", "exit_threshold": 0.1, "missing": "skip"},
    "acceleration": {"exit": "acceleration", "exit_threshold": 0.3},
    "kl": {"exit": "kl", "exit_threshold": 0.01, "missing": "skip"},
    "entropy": {"exit": "entropy", "exit_threshold": 0.3},
    "argmax": {"exit": "argmax", "exit_threshold": 1.0},
    "cdf": {"exit": "cdf", "exit_threshold": 0.9, "loss": "gate", "exit_least": 2},
    "draw": {"exit": "draw", "exit_threshold": 1.0, "loss": "gate"},
}


def small(recursion: dict | None = None, depth: dict | None = None, **model) -> LM:
    """A small model that passes the door."""
    cfg = Config(
        model=dataclasses.replace(MODEL, **model),
        depth=DepthConfig(**depth or {}),
        recursion=RecursionConfig(**recursion or {}),
        train=TrainConfig(steps=10),
    )
    check(cfg)
    assert from_dict(cfg.to_dict()) == cfg
    return LM.from_config(cfg)


def batch() -> dict:
    """Rows of two documents and padding."""
    tokens = jax.random.randint(jax.random.key(0), (4, T), 0, 32)
    seg = jnp.broadcast_to(1 + (jnp.arange(T) >= 7), (4, T)) * (jnp.arange(T) < T - 2)
    return {"tokens": tokens, "segment_ids": seg.astype(jnp.int32)}


@functools.partial(jax.jit, static_argnums=0)
def _gradients(lm: LM, params: dict, rows: dict) -> tuple[dict, dict]:
    return gradients(lm, params, rows, 1)


@functools.partial(jax.jit, static_argnums=0)
def _sums(lm: LM, params: dict, rows: dict) -> dict:
    loss = loop_loss if lm.recursion.trains else loss_fn
    return loss(lm, params, rows, loss_scales(lm, rows))[1]


def found(lm: LM, params: dict, **more: jax.Array) -> tuple[dict, dict]:
    """Gradients and sums of one batch."""
    return _gradients(lm, params, batch() | more)


def sums_of(lm: LM, params: dict) -> dict:
    """Sums of one batch alone, a smaller program."""
    return _sums(lm, params, batch())


@functools.partial(jax.jit, static_argnums=0)
def states(lm: LM, params: dict, tokens: jax.Array, seg: jax.Array | None = None) -> Forward:
    """Causal inference over whole rows."""
    return lm.forward(params, tokens, seg, mode="causal")


def assert_equal(a: tuple, b: tuple, atol: float = TOLERANCE) -> None:
    """The same loss and gradients; at 0, to the bit."""
    np.testing.assert_allclose(a[1]["loss"], b[1]["loss"], rtol=atol)
    for x, y in zip(jax.tree.leaves(a[0]), jax.tree.leaves(b[0]), strict=True):
        np.testing.assert_allclose(x, y, atol=atol * max(1.0, float(jnp.abs(x).max())))


# ---------------------------------------------------------------- decoding, causality


DECODED = {
    "random": (small, READS["random"], {}),
    "drawn": (small, READS["drawn"], {"recursions": 4, "layers": 5, "networks": 2}),
    "const": (small, READS["const"], {"norm_placement": "sandwich_in", "layer_scale": 0.5}),
    # past the recursions of training
    "zeros": (lambda *a, **k: small(*a, **k).at_depth(5), READS["zeros"], {}),
    "channel": (small, READS["channel"], {"norm_placement": "post", "coda": 1, "layers": 5}),
    **{
        name: (small, EXITS[name] | {"injection": "add"}, {"recursions": 5, "layers": 6})
        for name in ("latent", "kl", "cdf", "draw")
    },
}


@pytest.mark.parametrize("name", DECODED)
def test_cached_decoding_is_the_full_forward_pass(name):
    """Also with tokens that stop early, each at a depth of its own, and past the recursions of
    training. Nothing of it depends on later tokens."""
    make, recursion, model = DECODED[name]
    lm = make(recursion, **model)
    params = random_params(lm)
    tokens = jax.random.randint(jax.random.key(1), (2, T), 0, 32)
    changed = tokens.at[:, 8:].set((tokens[:, 8:] + 5) % 32)
    full = states(lm, params, jnp.concatenate([tokens, changed]))
    np.testing.assert_array_equal(full.h_BxTxD[:2, :8], full.h_BxTxD[2:, :8])
    want, depths = np.asarray(lm.logits(params, full.h_BxTxD)), np.asarray(full.depth_BxT)
    if name in EXITS:
        assert depths.min() < lm.program.recursions and depths.max() > depths.min()
    lengths, rows = np.array([3, 5]), np.arange(2)
    logits, cache, seen = jax.jit(prefill, static_argnums=(0, 4))(
        lm, params, tokens[:, :5], jnp.asarray(lengths), T
    )
    np.testing.assert_allclose(logits, want[rows, lengths - 1], atol=TOLERANCE)
    np.testing.assert_array_equal(np.asarray(seen)[1], depths[1, :5])
    step = jax.jit(functools.partial(decode_step, lm))
    for at in lengths + np.arange(6)[:, None]:
        logits, cache, d = step(params, cache, tokens[rows, at])
        np.testing.assert_allclose(logits, want[rows, at], atol=TOLERANCE)
        np.testing.assert_array_equal(d, depths[rows, at])


@pytest.mark.parametrize("name", EXITS)
def test_a_rule_stops_a_state_that_comes_to_rest(name):
    """Not at the first step it could compare with nothing, and no earlier under a smaller
    threshold."""
    rest, away = np.random.default_rng(0).normal(size=(2, 1, 4, 8)).astype(np.float32)
    path = [jnp.asarray(rest + 2.0 ** (1 - t) * away) for t in range(12)]
    reader = Reader(lambda h: h, lambda h: h[..., 0], jnp.arange(4)[None])
    rule, stopped = exit_rules.CHOICES[name], []
    for threshold in (
        (0.02, 0.3)
        if name not in ("argmax", "cdf", "draw")
        else (4, 1)
        if name == "argmax"
        else (0.99, 0.3)
    ):
        memory, first = rule.remember(reader, path[0]), np.full((1, 4), 99)
        for t in range(1, 12):
            stop, memory = rule.judge(memory, path[t - 1], path[t], reader, threshold)
            first = np.where(np.asarray(stop) & (first == 99), t, first)
        stopped.append(first)
    assert (stopped[0] >= stopped[1]).all() and (stopped[0] > stopped[1]).any()
    gated = name in ("cdf", "draw")
    assert stopped[1].min() >= (1 if gated else 2) and (gated or stopped[0].max() < 99)


def test_halting_is_drawn_from_the_gate():
    """The share of tokens that stop at each step is the gate's chance of it; a gate that never
    halts is the plain recursion."""
    logits, rule = (-1.0, 0.5, -0.3), exit_rules.CHOICES["draw"]
    reader = Reader(lambda h: h, lambda h: h[..., 0], jnp.arange(4000)[None])
    memory, shares = rule.remember(reader, jnp.zeros((1, 4000, 1))), []
    going = np.ones((1, 4000), bool)
    for z in logits:
        h = jnp.full((1, 4000, 1), z)
        stop, memory = rule.judge(memory, h, h, reader, 1.0)
        shares.append((going & np.asarray(stop)).mean())
        going &= ~np.asarray(stop)
    want = np.exp(log_stopping(jnp.asarray([*logits, 0.0])[:, None, None]))[:3, 0, 0]
    np.testing.assert_allclose(shares, want, atol=0.03)  # 4 standard deviations
    lm = small({"injection": "add", "loss": "gate"})
    params = random_params(lm)
    never = {"kernel": jnp.zeros((1, 16)), "bias": jnp.full((1,), -200.0)}
    params |= {"recursion": params["recursion"] | {"gate": never}}
    got = states(lm.with_exit("draw", 1.0), params, batch()["tokens"])
    np.testing.assert_array_equal(got.depth_BxT, lm.program.recursions)
    plain = states(lm, params, batch()["tokens"]).h_BxTxD
    np.testing.assert_allclose(got.h_BxTxD, plain, atol=TOLERANCE)


# ---------------------------------------------------------------- the identity ladder


def test_values_that_begin_as_nothing_are_nothing_at_first():
    """A channel factor of 1 is addition; learned and timed conditioning of 0 are none."""
    plain = small({"injection": "add"})
    params, tokens = random_params(plain), batch()["tokens"]
    assert "recursion" not in params
    want = states(plain, params, tokens).h_BxTxD
    for knobs in (
        {"injection": "channel"},
        {"injection": "add", "conditioning": "learned"},
        {"injection": "add", "conditioning": "time"},
    ):
        lm = small(knobs)
        own = params | {"recursion": jax.jit(lm.loop.init)(jax.random.key(0))}
        assert jax.tree.structure(own) == jax.tree.structure(
            jax.eval_shape(lm.init, jax.random.key(0))
        )
        np.testing.assert_allclose(states(lm, own, tokens).h_BxTxD, want, atol=1e-5)


def test_training_without_truncation_is_plain_training():
    """Last k with k >= R, and a draw that is R for every row, have the gradients of a fixed number
    of steps; each row is the model of its own depth."""
    plain = small({"injection": "add"})
    params = random_params(plain)
    want = found(plain, params)
    assert_equal(want, found(small({"injection": "add", "gradient_steps": 3}), params))
    drawn = small({"injection": "add", "sampling": "poisson", "sampling_scope": "sequence"})
    assert_equal(want, found(drawn, params, steps=jnp.full((4,), 3)))
    # Rows that wait for longer ones run their own steps, and only those.
    both, _ = jax.jit(
        lambda p, s: drawn.unroll(p, batch()["tokens"], batch()["segment_ids"], steps_B=s)
    )(params, jnp.asarray([1, 5, 3, 5]))
    for row, steps in enumerate((1, 5)):
        alone = states(plain.at_depth(steps), params, *batch().values())
        got = drawn.final_norm(params, both.h_BxTxD)
        np.testing.assert_allclose(got[row], alone.h_BxTxD[row], atol=TOLERANCE)


def test_a_truncated_gradient_is_that_of_the_last_steps():
    """Against a plain unrolling with the gradient stopped by hand, for fixed and drawn numbers of
    steps."""
    lm = small({"injection": "concat", "gradient_steps": 2})
    params, b = random_params(lm), batch()

    def by_hand(params):
        pos = jnp.where(jnp.arange(T) < 7, jnp.arange(T), jnp.arange(T) - 7) * (
            jnp.arange(T) < T - 2
        )
        pos = jnp.broadcast_to(
            jnp.where(jnp.arange(T) < T - 2, pos, jnp.arange(T) - (T - 2)), (4, T)
        )
        seg = b["segment_ids"]
        e = lm.enter(params, b["tokens"], seg)

        def run(p, e):
            return lm.looped(lm.core(p, pos, keep=False), p, e, pos)[0]

        still = jax.lax.stop_gradient
        s, _ = run(still(params), still(e))(still(e), pos, seg, seg, recursion=0)
        for t in (1, 2):
            s, _ = run(params, e)(s, pos, seg, seg, recursion=t)
        targets = jnp.pad(b["tokens"][:, 1:], ((0, 0), (0, 1)))
        weights = jnp.pad((seg[:, 1:] == seg[:, :-1]) & (seg[:, 1:] > 0), ((0, 0), (0, 1))).astype(
            jnp.float32
        )
        return lm.cross_entropy(params, lm.final_norm(params, s), targets, weights) / weights.sum()

    grads, sums = found(lm, params)
    loss, want = jax.jit(jax.value_and_grad(by_hand))(params)
    assert_equal((want, {"loss": loss}), (grads, sums))
    drawn = small({"injection": "concat", "gradient_steps": 2, "sampling": "uniform"})
    assert_equal((want, {"loss": loss}), found(drawn, params, steps=jnp.full((4,), 3)))


def test_losses_over_steps_are_means_of_losses_at_each_depth():
    """With the coda after every step. The gate's objective is its expectation."""
    lm = small({"injection": "add", "loss": "uniform"}, coda=1, layers=5)
    params = random_params(lm)
    final = dataclasses.replace(lm, recursion=RecursionConfig(injection="add"))
    sums = sums_of(lm, params)
    each = np.array([sums[f"recursion/{t}/nll"] for t in (1, 2, 3)])
    np.testing.assert_allclose(sums["loss"], each.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums_of(final.at_depth(2), params)["loss"], each[1], rtol=1e-5)
    np.testing.assert_allclose(sums["lm_loss"], each[-1], rtol=1e-5)
    gate = small({"injection": "add", "loss": "gate", "gate_weight": 0.3}, coda=1, layers=5)
    # stops with chance 1/2, 1/4, 1/4
    beside = {"gate": {"kernel": jnp.zeros((1, 16)), "bias": jnp.zeros((1,))}}
    grads, sums = found(gate, params | {"recursion": beside})
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(
        sums["recursion/divergence"], np.log(3) + (p * np.log(p)).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(
        sums["loss"], each @ p + 0.3 * sums["recursion/divergence"], rtol=1e-5
    )

    # The gate's own gradient, by finite differences of its bias.
    def moved(by):
        return sums_of(
            gate, params | {"recursion": {"gate": beside["gate"] | {"bias": jnp.full((1,), by)}}}
        )

    slope = (moved(0.02)["loss"] - moved(-0.02)["loss"]) / 0.04
    np.testing.assert_allclose(grads["recursion"]["gate"]["bias"][0], slope, atol=2e-3)


def test_stopping_is_a_distribution():
    """p sums to 1 whatever the gate says; a uniform p has the entropy ln R, so no divergence from
    the uniform prior."""
    z = 4 * jax.random.normal(jax.random.key(0), (5, 3, 7))
    log_p = log_stopping(z)
    np.testing.assert_allclose(jnp.exp(log_p).sum(0), 1, rtol=1e-5)
    uniform = log_prior(RecursionConfig(), 5)
    geometric = log_prior(RecursionConfig(gate_prior="geometric", gate_rate=0.3), 5)
    np.testing.assert_allclose(jnp.exp(geometric).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(geometric[1:] - geometric[:-1]), 0.7, rtol=1e-5)
    entropy = -(jnp.exp(log_p) * log_p).sum(0)
    np.testing.assert_allclose(divergence(log_p, uniform), np.log(5) - entropy, atol=1e-5)
    np.testing.assert_allclose(
        divergence(jnp.broadcast_to(uniform[:, None, None], z.shape), uniform), 0, atol=1e-6
    )
    index = jnp.asarray([[-2, 0], [-1, 1], [0, 2]])
    for loss in ("final", "uniform", "power", "decay"):
        weights = step_weights(RecursionConfig(loss=loss), index)
        np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-6)
        np.testing.assert_allclose(weights[:, 0], [0, 0, 1])
    for loss, want in (
        ("final", [0, 0, 6]),
        ("uniform", [2, 2, 2]),
        ("power", [1, 2, 3]),
        ("decay", [24, 12, 6]),
    ):
        weights = step_weights(RecursionConfig(loss=loss, loss_decay=0.5), index)[:, 1]
        np.testing.assert_allclose(weights, np.array(want) / sum(want), rtol=1e-6)


@pytest.mark.parametrize("rule", [{"exit": "kl"}, {"exit": "cdf", "exit_threshold": 1.0}])
def test_a_rule_that_never_stops_is_the_fixed_depth(rule):
    lm = small({"injection": "add", "loss": "gate"})
    params = random_params(lm)
    never = dataclasses.replace(lm, recursion=dataclasses.replace(lm.recursion, **rule))
    got, want = (states(one, params, batch()["tokens"]) for one in (never, lm))
    np.testing.assert_array_equal(got.depth_BxT, lm.program.recursions)
    np.testing.assert_allclose(got.h_BxTxD, want.h_BxTxD, atol=TOLERANCE)


def test_the_diagonal_injection_forgets():
    """Less than all of the state is carried over, whatever the parameters."""
    x = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32) * 3
    kept = injection.carry({"rate": {"bias": x[0]}, "delta": {"bias": x[1]}})
    assert (kept >= 0).all() and (kept < 1).all()


def test_drawn_depths():
    """A function of the step; one for the batch or one a row; the mean is the configured one."""
    for sampling, mean in (
        ("poisson", 4),
        ("lognormal_poisson", 4),
        ("uniform", 4),
        ("binomial", 2.5),
    ):
        c = RecursionConfig(sampling=sampling, sampling_scope="sequence", sampling_most=40)
        drawn = np.asarray(draw(c, 4, jnp.asarray(7), 4000))
        assert drawn.min() >= 1 and abs(drawn.mean() - mean) < 0.2, sampling
        np.testing.assert_array_equal(drawn, draw(c, 4, jnp.asarray(7), 4000))
        one = np.asarray(
            [draw(dataclasses.replace(c, sampling_scope="batch"), 4, s, 8) for s in range(6)]
        )
        assert (one == one[:, :1]).all() and len(set(one[:, 0])) > 1, sampling


# ---------------------------------------------------------------- refusals

REST = {"solver": "picard", "injection": "add"}
POST = {"norm_placement": "post"}
OF_DEPTH = ("kv", "policy", "ponder_weight", "epsilon", "inference")
CONFLICTS = {
    "would ever see the input": ({"state": "random"}, {}),
    "embedding and prelude would get no gradient": ({"gradient_steps": 2}, {}),
    "the learned state would get no gradient": (
        {"state": "const", "injection": "add", "gradient_steps": 2},
        {},
    ),
    "what the steps before the last": (
        {"injection": "add", "conditioning": "learned", "gradient_steps": 2},
        {},
    ),
    "with config.model.lora_rank": ({"injection": "add", "gradient_steps": 2}, {"lora_rank": 2}),
    "the gate of the steps before": ({"injection": "add", "loss": "gate", "gradient_steps": 2}, {}),
    "Use one of the two": ({"loss": "gate", "sampling": "poisson"}, {}),
    "has a row for each of 3 steps": ({"sampling": "poisson", "conditioning": "learned"}, {}),
    "runs steps past the last": ({"sampling": "poisson"}, {"lora_rank": 2}),
    "is below config.model.recursions": ({"sampling": "poisson", "sampling_most": 2}, {}),
    "looks back on the keys of step 1": ({"loss": "uniform"}, {"kv": "shared"}),
    "needs keys of every step": ({"exit": "latent"}, {"kv": "shared"}),
    "which only loss = 'gate' trains": ({"exit": "cdf"}, {}),
    "stand between core and head": ({"exit": "kl"}, {"coda": 1, "layers": 5}),
    "goes with config.depth.policy = 'fixed'": ({"loss": "uniform"}, {"policy": "expert_choice"}),
    "hands it states alone": ({"injection": "add"}, {"policy": "expert_choice"}),
    "are no whole number of rounds": ({"inner": 1, "injection": "add"}, {}),
    "is more than one network for each": (
        {"inner": 2, "injection": "add"},
        {"networks": 3, "recursions": 3},
    ),
    "carries two states": ({"inner": 2, "injection": "add"}, {"policy": "act"}),
    "make keys of their own": ({"inner": 2, "injection": "add"}, {"kv": "shared"}),
    "compare an update of z": ({"inner": 2, "injection": "add", "exit": "latent"}, {}),
    "would end within a round": ({"inner": 2, "injection": "add", "sampling": "poisson"}, {}),
    "there is no new answer": ({"inner": 2, "injection": "add", "loss": "uniform"}, {}),
    "into equal parts of whole rounds": (
        {"segments": 2, "injection": "add", "loss": "uniform"},
        {},
    ),
    "each needs a loss of its own": ({"segments": 3, "injection": "add"}, {}),
    "equal parts of a fixed number": (
        {"segments": 3, "injection": "add", "loss": "uniform", "sampling": "poisson"},
        {},
    ),
    "after the first segment": ({"segments": 3, "loss": "uniform"}, {}),
    "no gradient crosses its start": (
        {"segments": 3, "injection": "add", "loss": "uniform", "gradient_steps": 2},
        {},
    ),
    "is of the gradient at a fixed point": ({"adjoint_steps": 1}, {}),
    "another map each time": (REST | {"conditioning": "sinusoid"}, POST),
    "would be different maps": (REST | {"inner": 2}, POST),
    "would not depend on the input": ({"solver": "picard"}, POST),
    "nothing is kept": (REST | {"loss": "uniform"}, POST),
    "sampling means nothing": (REST | {"sampling": "poisson"}, POST),
    "gradient_steps means nothing": (REST | {"gradient_steps": 1}, POST),
    "never comes to rest": (REST, {}),
    "solves nothing": (REST | {"adjoint": "anderson"}, POST),
    "is a relative residual": (REST | {"tolerance": 1.0}, POST),
    "counts the cores": ({}, {"networks": 2, "sharing": "sequence", "prelude": -1, "layers": 3}),
    "the last would never run": ({}, {"networks": 4}),
    "over shared weights": ({}, {"networks": 3, "lora_rank": 2}),
    "rows of text cannot train": ({}, {"bidirectional": True, "attention": "xla"}),
    "that looks back": ({}, {"bidirectional": True}),
    "must be a number and not negative": ({}, {"policy": "act", "ponder_weight": -1.0}),
    "need not be used up": ({}, {"policy": "act", "epsilon": 1.0}),
    "is not made for policy 'mod'": ({}, {"policy": "mod", "inference": "auxiliary"}),
    "has no such core": ({"injection": "add"}, {"sharing": "none", "recursions": 1, "prelude": -1}),
    "varies around": ({"sampling": "poisson"}, {"recursions": 1, "layers": 2}),
    "Did you mean 'concat'": ({"injection": "concatt"}, {}),
}


@pytest.mark.parametrize("message", CONFLICTS)
def test_conflicts_are_refused_with_a_reason(message):
    recursion, rest = CONFLICTS[message]
    depth = {name: rest[name] for name in OF_DEPTH if name in rest}
    with pytest.raises(ConfigError) as e:
        small(
            recursion, depth, **{name: value for name, value in rest.items() if name not in depth}
        )
    assert message in str(e.value)


def test_depths_that_nothing_was_learned_for_are_refused():
    learned = {"injection": "add", "conditioning": "learned"}
    lm = small(learned)
    assert lm.at_depth(2).program.recursions == 2
    with pytest.raises(UserError, match="nothing for recursion 4"):
        lm.at_depth(4)
    params = random_params(lm)
    for beyond, index in (("clamp", [0, 1, 2, 2, 2]), ("modulo", [0, 1, 2, 0, 1])):
        deeper = small(learned | {"beyond": beyond}).at_depth(5)
        table = params["recursion"]["conditioning"]["bias"]
        written = {"conditioning": {"bias": table[jnp.asarray(index)]}}
        longer = dataclasses.replace(lm, model=deeper.model)
        want = states(
            longer, params | {"recursion": params["recursion"] | written}, batch()["tokens"]
        )
        np.testing.assert_allclose(
            states(deeper, params, batch()["tokens"]).h_BxTxD, want.h_BxTxD, atol=TOLERANCE
        )
    for other in (
        small({}, {"policy": "token_choice"}),
        small({}, sharing="none", recursions=1, prelude=-1),
    ):
        with pytest.raises(UserError, match="only a model of depth policy 'fixed'"):
            other.at_depth(2)


def test_every_word_of_a_knob_is_tested_here():
    used = [
        *READS.values(),
        *EXITS.values(),
        {"loss": "uniform"},
        {"injection": "none", "conditioning": "none"},
    ]
    for knob in ("state", "injection", "conditioning", "exit"):
        assert set(choices(knob)) <= {
            words.get(knob, getattr(RecursionConfig(), knob)) for words in used
        }
    assert {knob for knob in KNOBS if not choices(knob)} == set()
