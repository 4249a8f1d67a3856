"""What a position may depend on: nothing later, nothing in a neighbouring document. And the test
that it bites."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_params, small_lm, spread_routers

T = 48


init = functools.cache(random_params)


@functools.partial(jax.jit, static_argnums=(0, 4))
def jitted(lm, params, tokens, seg, mode):
    return lm.apply(params, tokens, seg, mode=mode)


def logits(lm, params, tokens, seg=None, mode="causal"):
    return np.asarray(
        jitted(lm, params, tokens, jnp.ones_like(tokens) if seg is None else seg, mode)
    )


def worst_change_before(lm, params, cut, seed, mode):
    """Largest change of logits before `cut` when all tokens from `cut` on are replaced."""
    a = jax.random.randint(jax.random.key(seed), (2, T), 0, 64)
    b = jnp.concatenate(
        [a[:, :cut], jax.random.randint(jax.random.key(seed + 1), (2, T - cut), 0, 64)], axis=1
    )
    return np.abs(logits(lm, params, a, mode=mode) - logits(lm, params, b, mode=mode))[
        :, :cut
    ].max()


@settings(max_examples=12)
@given(cut=st.integers(1, T - 1), seed=st.integers(0, 10_000))
@pytest.mark.parametrize(
    "kind", ["vanilla", "recursive", "mor", "token", "mor_shared", "token_hybrid"]
)
def test_future_tokens_cannot_change_the_past(kind, cut, seed):
    lm = small_lm(kind)
    params = spread_routers(init(lm))
    # Exactly zero: the same operations on the same numbers.
    assert worst_change_before(lm, params, cut, seed, "causal") == 0


def test_the_same_test_fails_in_topk_mode():
    """Top-k over the row looks ahead; if this passed, the test above would prove nothing."""
    lm = small_lm("mor")
    params = spread_routers(init(lm))
    changes = [worst_change_before(lm, params, T // 2, seed, "topk") for seed in range(5)]
    assert max(changes) > 1e-2


@pytest.mark.parametrize(
    "kind", ["vanilla", "recursive", "token", "token_every", "recursive_shared", "token_hybrid"]
)
def test_topk_mode_is_causal_where_no_token_competes(kind):
    """Fixed depth, and token-choice, which trains by the rule it decodes with (up to the order of
    sums: another row may take another profile of sizes)."""
    lm = small_lm(kind)
    params = spread_routers(init(lm))
    worst = max(worst_change_before(lm, params, T // 2, seed, "topk") for seed in range(3))
    assert worst <= (1e-4 if kind.startswith("token") else 0)


@settings(max_examples=12)
@given(first=st.integers(1, T - 2), seed=st.integers(0, 10_000))
@pytest.mark.parametrize(
    "kind", ["vanilla", "recursive", "mor", "token", "mor_shared", "token_hybrid"]
)
def test_a_neighbour_document_changes_nothing(kind, first, seed):
    """A packed document's logits are those it has alone, whatever shares its row."""
    lm = small_lm(kind)
    params = spread_routers(init(lm))
    tokens = jax.random.randint(jax.random.key(seed), (1, T), 0, 64)
    seg = jnp.asarray([[1] * first + [2] * (T - first)])
    packed = logits(lm, params, tokens, seg)
    other = tokens.at[:, :first].set((tokens[:, :first] + 7) % 64)
    # Exactly zero for another neighbour of the same length ...
    assert np.abs(packed - logits(lm, params, other, seg))[:, first:].max() == 0
    # ... and up to the order of sums for no neighbour at all (padding behind it instead).
    alone = logits(
        lm,
        params,
        jnp.pad(tokens[:, first:], ((0, 0), (0, first))),
        jnp.pad(seg[:, first:], ((0, 0), (0, first))),
    )
    alone = alone[:, : T - first]
    np.testing.assert_allclose(packed[:, first:], alone, atol=2e-5 * np.abs(alone).max())


def test_without_segments_the_neighbour_is_seen(kind):
    """The packing test bites: one document instead of two, and the change arrives."""
    lm = small_lm(kind)
    params = init(lm)
    tokens = jax.random.randint(jax.random.key(1), (1, T), 0, 64)
    other = tokens.at[:, :10].set((tokens[:, :10] + 7) % 64)
    assert np.abs(logits(lm, params, tokens) - logits(lm, params, other))[:, 10:].max() > 1e-2
