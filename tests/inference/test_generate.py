"""Sampling and plain generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import random_params, small_lm

from mor_jax.errors import UserError
from mor_jax.inference.generate import Generation
from mor_jax.inference.sampler import Sampling, sample


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
