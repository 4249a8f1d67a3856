"""Speculation changes how many tokens a tick draws and nothing about which: greedy or sampled, with
stop tokens, penalties, a grammar, limits of depth, full logs, lanes that come and go."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_params, small_lm, spread_routers

from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import UserError
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.grammar import Grammars
from mor_jax.inference.engine.request import Drawing, Finished, Request, Token
from mor_jax.inference.engine.rows import host_row
from mor_jax.inference.engine.service import EngineService
from mor_jax.model.depth import DepthControl

LANES, CONTEXT, VOCAB, K = 4, 64, 272, 3
ROOM = 60  # of the last lane
CHUNK = 8  # the smallest compiles fastest
GREEDY = Drawing(temperature=0.0)


@functools.cache
def made(kind, speculate, **model):
    # one block a step: compiling is what these tests take long for
    layers = {"token_hybrid": 3}.get(kind, 5)
    lm = small_lm(kind, context=CONTEXT, vocab_size=VOCAB, layers=layers, **model)
    params = spread_routers(random_params(lm))
    config = EngineConfig(
        lanes=LANES,
        chunks=(CHUNK,),
        boundary_every=lm.program.recursions,
        max_logprobs=3,
        speculate=speculate,
        full_lanes=LANES - 1 if kind == "mor" else LANES,
        entries=ROOM,
    )
    device = Device(lm, params, config)
    device.warm_up()
    return device


class Lane:
    """What came out of one lane."""

    def __init__(
        self, device, lane, prompt, new, drawing=GREEDY, control=None, grammar=None, **more
    ):
        self.lane, self.tokens, self.depths, self.logprobs, self.ended = lane, [], [], [], False
        self.starved, self.grammar, self._at = False, grammar, len(prompt)
        device.open(lane, control)
        for start in range(0, len(prompt) - 1, CHUNK):
            device.prefill(lane, prompt[start : min(start + CHUNK, len(prompt) - 1)]).fetch()
        row = host_row(drawing, device.draw_config, prompt=prompt, grammar=grammar, **more)
        device.start(lane, prompt[-1], row, new)

    def take(self, device, ticked):
        i = self.lane
        self.starved |= bool(ticked.starved_N[i])
        if self.ended or ticked.token_N[i] < 0:
            return
        self.tokens.append(int(ticked.token_N[i]))
        self.depths.append(int(ticked.depth_N[i]))
        self.logprobs.append(float(ticked.logprob_N[i]))
        self.ended = bool(ticked.ended_N[i])
        if self.grammar is not None:
            self.grammar.advance(self.tokens[-1])
            self.ended |= self.grammar.finished
            if not self.ended:
                device.put_mask(i, self.grammar.allowed(), self._at + len(self.tokens))
        if self.ended:
            device.stop(i)


def run(device, lanes, most=200):
    """Tick until all lanes have ended or stand still; ticks it took."""
    for n in range(most):
        if all(lane.ended or lane.starved for lane in lanes):
            return n
        for ticked in device.tick().fetch():
            for lane in lanes:
                lane.take(device, ticked)
    raise AssertionError("the lanes do not come to their end")


PROMPTS = [[5, 9, 2, 40, 7, 7], [3], list(range(20, 41)), [8, 8]]


def shallow(device, most):
    neutral = DepthControl.neutral(1, device.recursions)
    return neutral._replace(cap_B=jnp.full((1,), most, jnp.int32))


def outcome(device):
    """Everything a mixed batch says, on this device."""
    lanes = [
        Lane(device, 0, PROMPTS[0], 40, logprobs=2),
        Lane(device, 1, PROMPTS[1], 63, Drawing(seed=3, frequency_penalty=0.5, top_p=0.9)),
        Lane(device, 2, PROMPTS[2], 1),
        Lane(
            device,
            3,
            PROMPTS[3],
            30,
            Drawing(temperature=0.7, seed=9),
            stop_tokens=range(30, 44),
            min_tokens=4,
        ),
    ]
    run(device, lanes)
    # A freed lane is taken by the next, under a limit of its depth, while nothing else runs.
    lanes += [
        Lane(device, 3, PROMPTS[2], 20, control=shallow(device, 2)),
        Lane(device, 0, [1] * 60, 4),
    ]
    run(device, lanes[4:])
    return lanes


@pytest.mark.parametrize("kind", ["mor", "token_hybrid", "mor_relaxed"])
def test_tokens_are_those_of_plain_decoding(kind):
    plain, guessing = made(kind, 0), made(kind, K)
    want, got = outcome(plain), outcome(guessing)
    for a, b in zip(want, got, strict=True):
        assert b.tokens == a.tokens and b.depths == a.depths
    np.testing.assert_allclose(got[0].logprobs, want[0].logprobs, atol=1e-4)
    assert len(got[1].tokens) == 63 and len(got[5].tokens) == 4  # up to the end of the context
    assert guessing.drafted > 0 and 0 < guessing.accepted <= guessing.drafted
    for lane in (0, 3):  # nothing of a draft is left: as many entries as without
        assert guessing.lengths(lane) == plain.lengths(lane)
    # The draft of a token that would stop at its depth anyway is the token itself.
    neutral = Lane(guessing, 0, PROMPTS[0], 41, control=shallow(guessing, 1))
    assert run(guessing, [neutral]) == -(-41 // (K + 1))


def test_tokens_are_those_of_plain_decoding_in_bfloat16_too():
    """Verification attends in other parts than decoding does; see `softmax.Softmax`."""
    rng, usable = np.random.default_rng(0), LANES - 1  # of the lanes
    prompts = [rng.integers(0, 256, n).tolist() for n in rng.integers(2, 20, 8 * usable)]
    got = []
    for speculate in (0, K):
        device, told = made("mor", speculate, dtype="bfloat16"), []
        for i in range(0, len(prompts), usable):
            batch = [
                Lane(device, lane, prompt, 40)
                for lane, prompt in enumerate(prompts[i : i + usable])
            ]
            run(device, batch)
            told += [(lane.tokens, lane.depths) for lane in batch]
        got.append(told)
    assert got[0] == got[1]
    assert made("mor", K, dtype="bfloat16").accepted > 0


def test_a_full_log_stands_still_and_loses_nothing():
    device, tight = made("mor", K), LANES - 1
    deep = DepthControl.neutral(1, device.recursions)._replace(floor_B=jnp.full((1,), 2, jnp.int32))
    whole = Lane(device, 1, PROMPTS[0], 50, control=deep)
    run(device, [whole])
    cut, other = (Lane(device, lane, PROMPTS[0], 50, control=deep) for lane in (tight, 0))
    run(device, [cut, other])
    assert cut.starved and not cut.ended and 0 < len(cut.tokens) < 50
    assert device.lengths(tight).entries <= ROOM
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and other.tokens == whole.tokens
    for _ in range(2):  # and goes on standing
        assert all(ticked.token_N[tight] == -1 for ticked in device.tick().fetch())
    device.stop(tight)
    # anew, where there is room
    moved = Lane(device, 0, PROMPTS[0] + cut.tokens, 50 - len(cut.tokens), control=deep)
    run(device, [moved])
    assert cut.tokens + moved.tokens == whole.tokens


def test_a_grammar_is_obeyed_one_token_at_a_time():
    device, tokenizer = made("mor", K), ByteTokenizer()
    options = ["yes", "no", "perhaps"]
    grammar = Grammars(tokenizer, vocab_size=VOCAB).choice(options)
    constrained = Lane(device, 2, [256, 65], 20, Drawing(seed=1), grammar=grammar)
    free = Lane(device, 0, [256, 65], 20)
    run(device, [constrained, free])
    assert tokenizer.decode(constrained.tokens) in options and len(free.tokens) == 20


def test_company_changes_nothing():
    device = made("mor", K)
    alone = Lane(device, 2, PROMPTS[2], 30, Drawing(seed=5), logprobs=1)
    run(device, [alone])
    company = [Lane(device, i, PROMPTS[i], 30, Drawing(seed=i)) for i in (0, 1, 3)]
    again = Lane(device, 2, PROMPTS[2], 30, Drawing(seed=5), logprobs=1)
    run(device, [*company, again])
    assert again.tokens == alone.tokens and again.logprobs == alone.logprobs


@functools.cache
def plainly(prompt, new, temperature, seed):
    """Tokens of a request that has the engine to itself and speculates nothing."""
    alone = Lane(
        made("mor", 0), 0, PROMPTS[prompt], new, Drawing(temperature=temperature, seed=seed)
    )
    run(made("mor", 0), [alone])
    return alone.tokens


wishes = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.sampled_from([1, 2, 5, 18, 40]),
    st.sampled_from([0.0, 1.0]),
    st.integers(0, 2),
)


@settings(max_examples=40)
@given(st.lists(st.tuples(wishes, st.sampled_from([False] * 5 + [True])), min_size=1, max_size=10))
def test_the_service_hands_out_the_tokens_of_plain_decoding(schedule):
    """More requests than lanes, one of the lanes too small for some, and requests that are
    cancelled."""
    device = made("mor", K)
    service, told = EngineService(device), [[] for _ in schedule]
    try:
        for ((prompt, new, temperature, seed), cancels), events in zip(schedule, told, strict=True):
            request = Request(
                tuple(PROMPTS[prompt]), new, Drawing(temperature=temperature, seed=seed)
            )
            ticket = service.submit(request, events.extend)
            if cancels:
                ticket.cancel()
        assert service.drain(300)
        stats = service.stats()
    finally:  # the next example has the device to itself
        service.close()
    for (wish, cancels), events in zip(schedule, told, strict=True):
        tokens, end = [event.id for event in events if isinstance(event, Token)], events[-1]
        assert isinstance(end, Finished) and end.completion_tokens == len(tokens)
        assert end.reason == "length" or (cancels and end.reason == "cancelled")
        assert tokens == (
            plainly(*wish) if end.reason == "length" else plainly(*wish)[: len(tokens)]
        )
    drafted, accepted = (
        stats[f"spec_decode_num_{name}_tokens_total"] for name in ("draft", "accepted")
    )
    assert 0 <= accepted <= drafted <= device.drafted and accepted <= device.accepted


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("vanilla", {"speculate": 2}),
        ("mor", {"speculate": 2, "draft_depth": 3}),
        ("mor", {"speculate": 1, "draft_depth": 0}),
        ("mor", {"speculate": -1}),
        ("mor", {"speculate": 2, "ticks_per_dispatch": 4}),
    ],
)
def test_what_cannot_be_drafted_is_refused(kind, config):
    lm = small_lm(kind)
    with pytest.raises(UserError, match="speculat"):
        Device(lm, random_params(lm), EngineConfig(**config))
