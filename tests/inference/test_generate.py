"""Sampling and plain generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import random_params, small_lm

from mor_jax.config import ModelConfig, RecursionConfig
from mor_jax.errors import ConfigError, UserError
from mor_jax.inference.dial import depth_control
from mor_jax.inference.generate import Generation
from mor_jax.inference.sampler import Sampling, sample
from mor_jax.model.lm import LM


def draws(logits, sampling, n=2000):
    keys = jax.random.split(jax.random.key(0), n)
    return np.asarray(
        jax.jit(lambda k: sample(jnp.broadcast_to(logits, (n, len(logits))), k, sampling))(keys)
    )


def test_sampled_frequencies_are_the_softmax():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    share = np.bincount(draws(logits, Sampling(1.0)), minlength=4) / 2000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.15, 0.05], atol=0.04)  # 3.6 standard deviations


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(0.0), {1}),
        (Sampling(1.0, top_k=1), {1}),
        (Sampling(1.0, top_k=2), {1, 3}),
        (Sampling(1.0, top_p=0.5), {1}),  # the first token alone holds 0.5
        (Sampling(1.0, top_p=0.75), {1, 3}),
        (Sampling(1.0, top_p=1e-9), {1}),
        (Sampling(1.0, top_k=3, top_p=0.6), {1, 3}),
        (Sampling(2.0), {0, 1, 2, 3}),
    ],
)
def test_only_allowed_tokens_are_drawn(sampling, allowed):
    logits = jnp.log(jnp.asarray([0.05, 0.5, 0.15, 0.3]))
    assert set(draws(logits, sampling)) == allowed


@given(temperature=st.floats(max_value=-1e-9) | st.just(float("nan")) | st.just(float("inf")))
def test_bad_temperature_is_refused(temperature):
    with pytest.raises(UserError, match="temperature"):
        Sampling(temperature)


@pytest.mark.parametrize("kwargs", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_cutoffs_are_refused(kwargs):
    with pytest.raises(UserError, match=next(iter(kwargs))):
        Sampling(1.0, **kwargs)


def tokens_of(run):
    return np.stack([g.token_B for g in run], axis=1)


def test_greedy_generation_is_the_argmax_of_the_full_forward_pass(kind):
    lm = small_lm(kind)
    params = random_params(lm)
    prompts = [[5, 9, 2, 40, 7, 7], [3]]
    run = Generation(lm, params, prompts, max_tokens=20)
    got = tokens_of(run)

    @jax.jit
    # parameters that were constants would be folded by the compiler
    def forward(params, tokens, seg):
        out = lm.forward(params, tokens, seg, mode="causal")
        return lm.logits(params, out.h_BxTxD), out.depth_BxT

    for prompt, new, depths in zip(prompts, got, run.prompt_depths, strict=True):
        sequence = np.array([*prompt, *new])
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(sequence)] = sequence
        logits, depth = forward(
            params, jnp.asarray(padded), jnp.asarray(np.arange(32) < len(sequence), jnp.int32)[None]
        )
        want = np.argmax(np.asarray(logits)[0, len(prompt) - 1 : len(sequence) - 1], axis=-1)
        np.testing.assert_array_equal(new, want)
        np.testing.assert_array_equal(depths, np.asarray(depth)[0, : len(prompt)])
    assert int(run.last_depths()[1]) == int(np.asarray(depth)[0, len(sequence) - 1])


def test_same_seed_same_text_and_a_sequence_does_not_depend_on_its_company():
    lm = small_lm("mor")
    params = random_params(lm)

    def go(prompts, seed):
        return tokens_of(
            Generation(lm, params, prompts, max_tokens=12, sampling=Sampling(1.0), seed=seed)
        )

    a, b = go([[5, 9], [3, 1]], 7), go([[5, 9], [3, 1]], 7)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a[0], go([[5, 9], [60, 61]], 7)[0])
    assert (a != go([[5, 9], [3, 1]], 8)).any()


def test_padding_of_the_table_is_never_drawn():
    lm = small_lm("vanilla")
    run = Generation(
        lm, random_params(lm), [[1]], max_tokens=40, sampling=Sampling(5.0), vocab_size=3
    )
    assert tokens_of(run).max() < 3


def test_the_context_is_a_limit():
    lm = small_lm("vanilla")
    params = random_params(lm)
    run = Generation(lm, params, [[1] * 60], max_tokens=100)
    assert tokens_of(run).shape[1] == 4
    for prompt, message in ([1] * 64, "context is 64"), ([], "no tokens"):
        with pytest.raises(UserError, match=message):
            Generation(lm, params, [prompt], max_tokens=1)
    with pytest.raises(UserError, match="max_tokens"):
        Generation(lm, params, [[1]], max_tokens=0)


def test_tokens_that_stop_by_themselves_are_generated_as_the_full_pass_says():
    """An exit rule given after training, at more recursions than training had: each generated token
    is the likeliest of the full causal pass and runs as deep as there, under a cap too."""
    lm = LM(
        ModelConfig(
            layers=3,
            recursions=3,
            sharing="cycle",
            width=16,
            heads=2,
            kv_heads=1,
            mlp_width=24,
            vocab_size=32,
            context=24,
            init_std=0.3,
            loss_chunk=0,
        ),
        recursion=RecursionConfig(injection="add"),
    )
    params, prompts = random_params(lm), [[3, 1, 4], [1, 5, 9, 2, 6]]
    early = lm.at_depth(6).with_exit("latent", 0.3, least=2)
    capped = depth_control(early, params, 2, max_depth=4)
    full = jax.jit(lambda p, row, control: early.forward(p, row, mode="causal", control=control))
    for control, most in ((depth_control(early, params, 2), 6), (capped, 4)):
        run = Generation(early, params, prompts, max_tokens=10, control=control)
        steps = list(run)
        drawn = np.stack([g.token_B for g in steps], axis=1)
        depths = np.stack([*(g.previous_depth_B for g in steps[1:]), run.last_depths()], axis=1)
        assert len(np.unique(depths)) > 1 and depths.min() >= 2 and depths.max() <= most
        for b, prompt in enumerate(prompts):
            row = jnp.asarray([*prompt, *drawn[b]])[None]
            one = jax.tree.map(lambda x, b=b: x[b : b + 1], control)
            want = full(params, row, one)
            said = np.asarray(jnp.argmax(early.logits(params, want.h_BxTxD)[0], axis=-1))
            at = len(prompt)
            np.testing.assert_array_equal(drawn[b], said[at - 1 : -1])
            np.testing.assert_array_equal(depths[b], want.depth_BxT[0, at:])
            np.testing.assert_array_equal(run.prompt_depths[b], want.depth_BxT[0, :at])
    with pytest.raises(ConfigError, match="which only loss = 'gate' trains"):
        lm.with_exit("cdf", 0.5)
