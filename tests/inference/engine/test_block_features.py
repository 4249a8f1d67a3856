"""All features of the block at once, wherever a token is read or drawn: each equals the full causal
forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driving import CONTEXT, GREEDY, Job, fill, prompts
from kinds import ALL_FEATURES
from small import random_params, small_lm, spread_routers

from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.grammar import Grammars
from mor_jax.inference.engine.rows import host_row
from mor_jax.inference.engine.scoring import Scorer

VOCAB, LANES, NEW, TOP = 272, 3, 12, 3
TOLERANCE = 2e-4  # float32 logits of order 10: other shapes, other summation order


@functools.cache
def made(kind="mor"):
    lm = small_lm(kind, context=CONTEXT, layers=5, vocab_size=VOCAB, **ALL_FEATURES)
    return lm, spread_routers(random_params(lm))


@functools.cache
def full(kind="mor"):
    """tokens [T] -> float32 logits [T, V] of the full causal forward pass, one program for all
    T."""
    lm, params = made(kind)
    run = jax.jit(lambda params, tokens: lm.apply(params, tokens[None], mode="causal")[0])

    def logits(tokens):
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(run(params, jnp.asarray(padded)))[: len(tokens)]

    return logits


def log_softmax(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))


# under shared keys later steps project queries alone
@pytest.mark.parametrize("kind", ["mor", "mor_shared"])
def test_plain_decode(kind):
    lm, params = made(kind)
    (tokens,) = prompts(0, 20)
    want = full(kind)(tokens)
    padded = np.asarray([tokens[:8]], np.int32)
    logits, cache, _ = jax.jit(prefill, static_argnums=(0, 4))(
        lm, params, padded, jnp.asarray([8]), CONTEXT
    )
    step = jax.jit(functools.partial(decode_step, lm))
    for at in range(8, 20):
        np.testing.assert_allclose(logits[0], want[at - 1], atol=TOLERANCE)
        logits, cache, _ = step(params, cache, jnp.asarray([tokens[at]]))


@pytest.mark.parametrize("kind", ["mor", "mor_shared"])
def test_scores(kind):
    lm, params = made(kind)
    (tokens,) = prompts(1, 29)
    scored = Scorer(lm, params, max_logprobs=TOP, chunk=8).score(tokens)
    want = log_softmax(full(kind)(tokens))
    np.testing.assert_allclose(scored.logprobs[1:], want[np.arange(28), tokens[1:]], atol=TOLERANCE)


@pytest.mark.parametrize("speculate", [0, 2])
def test_ticks(speculate):
    """Greedy lanes take the likeliest token, one under a grammar the likeliest that is allowed;
    log-probabilities are the model's."""
    lm, params = made()
    sizes = {"lanes": LANES, "chunks": (8,), "full_lanes": LANES, "max_logprobs": TOP}
    device = Device(
        lm, params, EngineConfig(boundary_every=3 if speculate else 1, speculate=speculate, **sizes)
    )
    device.warm_up()
    grammar = Grammars(ByteTokenizer(), vocab_size=VOCAB).choice(["perhaps so", "perhaps not"])
    told = [[] for _ in range(LANES)]  # (token, log-probability)
    begun, allowed = prompts(2, 5, 19, 12), []
    for lane, prompt in enumerate(begun):
        fill(device, Job(prompt, NEW, lane, logprobs=1))
    row = host_row(GREEDY, device.draw_config, prompt=begun[2], grammar=grammar, logprobs=1)
    device.start(2, begun[2][-1], row, NEW)
    running = set(range(LANES))
    for _ in range(60):
        for ticked in device.tick().fetch():
            for lane in list(running):
                if ticked.token_N[lane] < 0:
                    continue
                told[lane].append((int(ticked.token_N[lane]), float(ticked.logprob_N[lane])))
                done = bool(ticked.ended_N[lane])
                if lane == 2:
                    allowed.append(
                        np.unpackbits(grammar.allowed().view(np.uint8), bitorder="little")[:VOCAB]
                        > 0
                    )
                    grammar.advance(told[2][-1][0])
                    done |= grammar.finished
                    if not done:
                        device.put_mask(2, grammar.allowed(), len(begun[2]) + len(told[2]))
                if done:
                    device.stop(lane)
                    running.discard(lane)
        if not running:
            break
    assert not running
    for lane, prompt in enumerate(begun):
        drawn = [token for token, _ in told[lane]]
        assert len(drawn) >= 8
        logits = full()(prompt + drawn)[len(prompt) - 1 : -1]
        logprobs = log_softmax(logits)[np.arange(len(drawn)), drawn]
        np.testing.assert_allclose([p for _, p in told[lane]], logprobs, atol=TOLERANCE)
        best = np.where(allowed, logits, -np.inf) if lane == 2 else logits
        # A near tie of two logits may fall either way.
        assert (best[np.arange(len(drawn)), drawn] >= best.max(axis=-1) - TOLERANCE).all()
