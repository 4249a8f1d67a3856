"""Scores of a prompt in chunks are those of the full causal forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm, spread_routers

from mor_jax.errors import UserError
from mor_jax.inference.engine.scoring import Scorer
from mor_jax.model.depth import DepthControl

VOCAB, CONTEXT, TOP = 60, 64, 4


@functools.cache
def made(kind):
    lm = small_lm(kind, context=CONTEXT, layers={"token_hybrid": 3}.get(kind, 5))
    params = spread_routers(random_params(lm))
    return lm, params, Scorer(lm, params, vocab_size=VOCAB, max_logprobs=TOP, chunk=8)


def plain(lm, params):
    run = jax.jit(
        lambda params, tokens, control: lm.apply(params, tokens, mode="causal", control=control)
    )

    def score(tokens, control):
        padded = np.zeros((1, CONTEXT), np.int32)  # one program for all lengths
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(run(params, jnp.asarray(padded), control))[
            0, : len(tokens) - 1, :VOCAB
        ].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return score


@pytest.mark.parametrize("kind", ["mor", "token_hybrid"])
def test_scores_equal_the_full_forward_pass(kind):
    lm, params, scorer = made(kind)
    oracle, steps = plain(lm, params), lm.program.recursions
    rng = np.random.default_rng(0)
    neutral = DepthControl.neutral(1, steps)
    shallow = neutral._replace(cap_B=jnp.ones((1,), jnp.int32))
    # One token; less than a chunk, a chunk and its last token, several chunks, the whole context;
    # one after another.
    for length, control in [
        (1, None),
        (2, None),
        (17, None),
        (40, shallow),
        (18, None),
        (CONTEXT, None),
    ]:
        tokens = rng.integers(0, VOCAB, length).tolist()
        scored = scorer.score(tokens, control)
        assert len(scored.logprobs) == len(scored.top) == length
        assert scored.logprobs[0] is None and scored.top[0] == ()
        if length == 1:
            continue
        want = oracle(tokens, neutral if control is None else control)
        np.testing.assert_allclose(
            scored.logprobs[1:], want[np.arange(length - 1), tokens[1:]], atol=2e-4
        )
        best = np.sort(want, axis=-1)[:, ::-1][:, :TOP]
        np.testing.assert_allclose([[p for _, p in top] for top in scored.top[1:]], best, atol=2e-4)
        for row, top in zip(want, scored.top[1:], strict=True):
            np.testing.assert_allclose(row[[i for i, _ in top]], [p for _, p in top], atol=2e-4)
    with pytest.raises(UserError, match=f"1 to {CONTEXT} tokens, got {CONTEXT + 1}"):
        scorer.score([1] * (CONTEXT + 1))
    with pytest.raises(UserError, match="1 to"):
        scorer.score([])
    with pytest.raises(UserError, match=f"below {VOCAB}, got {VOCAB}"):
        scorer.score([1, VOCAB])


def test_other_work_goes_between_chunks_and_nothing_compiles_after_the_warm_up():
    _, _, scorer = made("mor")
    scorer.warm_up()
    compiled = scorer._run._cache_size(), scorer._open._cache_size()
    *pauses, scored = scorer.steps(list(range(50)))
    # 49 tokens go in, the last only comes out
    assert pauses == [None] * 7 and len(scored.logprobs) == 50
    assert (scorer._run._cache_size(), scorer._open._cache_size()) == compiled
    first = scorer.steps(list(range(50)))
    next(first)
    next(scorer.steps([1, 2, 3]))
    with pytest.raises(RuntimeError, match="another prompt"):
        next(first)
