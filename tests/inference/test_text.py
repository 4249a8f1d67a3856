"""Text from the engine is the text of plain generation, every piece with the depth its token
ran."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm, spread_routers

from mor_jax.config import MeshConfig
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import UserError
from mor_jax.inference.engine.build import build_service
from mor_jax.inference.engine.device import EngineConfig
from mor_jax.inference.generate import Generation
from mor_jax.inference.sampler import Sampling, sample
from mor_jax.inference.text import complete, stream_text
from mor_jax.parallel.mesh import make_mesh


@dataclasses.dataclass
class Model:
    lm: object
    params: object
    tokenizer: object
    mesh: object = None


@pytest.fixture(scope="module")
def model():
    tokenizer = ByteTokenizer()
    lm = small_lm("mor", vocab_size=tokenizer.vocab_size)
    return Model(lm, spread_routers(random_params(lm)), tokenizer)


@pytest.fixture(scope="module")
def service(model):
    made = build_service(model, EngineConfig(lanes=2, full_lanes=2, chunks=(64,), boundary_every=3))
    yield made
    made.close()


def plain(model, prompt, most):
    """(tokens, depths of the prompt and of them) up to the end of the text."""
    tokenizer = model.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    run = Generation(
        model.lm, model.params, [ids], max_tokens=most, vocab_size=tokenizer.vocab_size
    )
    tokens = [int(g.token_B[0]) for g in run]
    tokens = tokens[: tokens.index(tokenizer.eos)] if tokenizer.eos in tokens else tokens
    sequence = np.zeros((1, 64), np.int32)
    sequence[0, : len(ids) + len(tokens)] = ids + tokens
    result = model.lm.forward(model.params, jnp.asarray(sequence), mode="causal")
    return tokens, np.asarray(result.depth_BxT)[0, : len(ids) + len(tokens)].tolist()


@pytest.mark.parametrize(("prompt", "most"), [("def f(", 12), ("é", 1), ("", 5), ("x" * 40, 200)])
def test_pieces_are_those_of_plain_generation(model, service, prompt, most):
    pieces = list(
        stream_text(model, prompt, max_tokens=most, sampling=Sampling(0.0), service=service)
    )
    tokens, depths = plain(model, prompt, min(most, 64 - 1 - len(prompt.encode())))
    text = "".join(p.text for p in pieces)
    assert text == model.tokenizer.decode([*model.tokenizer.encode(prompt), *tokens])
    assert "".join(p.text for p in pieces if p.in_prompt) == prompt
    read = len(depths) - (len(depths) == 64)  # nobody reads the token that fills the context
    assert [p.depth for p in pieces][:read] == depths[:read]
    assert len(set(depths)) > 1 or len(depths) < 8


def test_one_seed_one_text_and_an_engine_of_its_own(model, service):
    def draw(seed, **where):
        return "".join(p.text for p in stream_text(model, "ab", max_tokens=20, seed=seed, **where))

    assert draw(1, service=service) == draw(1, service=service) != draw(2, service=service)
    assert draw(1) == draw(1, service=service), "the default engine draws the same"


def test_depths_and_lengths_that_cannot_be_are_refused(model, service):
    def go(prompt="a", **how):
        return list(stream_text(model, prompt, service=service, **how))

    with pytest.raises(UserError, match="context is 64"):
        go("y" * 64)
    with pytest.raises(UserError, match="max_tokens"):
        go(max_tokens=0)
    with pytest.raises(UserError, match="depth"):
        go(max_depth=9)
    assert {p.depth for p in go(max_depth=1, max_tokens=4)} <= {0, 1}


def test_stopping_to_read_ends_the_request(model, service):
    pieces = stream_text(model, "a", max_tokens=50, service=service)
    next(pieces)
    pieces.close()
    assert service.drain(60)


def test_a_relaxed_model():
    """A relaxed model with an auxiliary router: text, and the depth of every piece, all the
    same."""
    tokenizer = ByteTokenizer()
    lm = small_lm("mor_relaxed", vocab_size=tokenizer.vocab_size, layers=5)
    model = Model(
        lm, spread_routers(random_params(lm)), tokenizer, make_mesh(MeshConfig(), jax.devices()[:1])
    )
    pieces = list(stream_text(model, "ab", max_tokens=5, sampling=Sampling(0.0)))
    tokens, depths = plain(model, "ab", 5)
    assert "".join(p.text for p in pieces) == tokenizer.decode([*tokenizer.encode("ab"), *tokens])
    assert [p.depth for p in pieces][: len(depths)] == depths


def test_completions_in_one_batch_are_what_each_is_alone(model):
    prompts, sampling = ["def f(", "x = ", "return"], Sampling(0.9, min_p=0.02)
    found = complete(model, prompts, n=2, max_tokens=12, sampling=sampling, seed=5)
    assert [(c.prompt, c.index) for c in found] == [(p, i) for p in prompts for i in range(2)]
    for c in found:
        [alone] = complete(model, [c.prompt], max_tokens=12, sampling=sampling, seed=5 + c.index)
        assert (alone.text, alone.finish) == (c.text, c.finish)
    pieces = list(stream_text(model, prompts[0], max_tokens=12, sampling=sampling, seed=5))
    assert "".join(p.text for p in pieces if not p.in_prompt) == found[0].text


def test_a_stop_string_ends_a_text_before_itself(model):
    greedy = Sampling(0.0)
    [whole] = complete(model, ["def f("], max_tokens=20, sampling=greedy)
    assert len(whole.text) > 8
    stop = whole.text[4:7]
    [cut] = complete(model, ["def f("], max_tokens=20, sampling=greedy, stop=["never seen", stop])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish == "stop"


def test_min_p_leaves_out_the_unlikely():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 400)
    for min_p, kept in ((0.0, {0, 1, 2, 3}), (0.2, {0, 1, 2}), (0.5, {0, 1}), (1.0, {0})):
        draws = sample(jnp.repeat(logits, 400, 0), keys, Sampling(1.0, min_p=min_p))
        assert set(np.asarray(draws).tolist()) == kept
    with pytest.raises(UserError, match="min_p"):
        Sampling(min_p=1.5)


@pytest.mark.parametrize(
    ("fields", "said"), [({"n": 0}, "n must"), ({"stop": [""]}, "stop string")]
)
def test_what_complete_refuses(model, fields, said):
    with pytest.raises(UserError, match=said):
        complete(model, ["x"], **fields)
