"""The whole engine on the real device: schedules, seeds, prefix hits and moves against plain
decoding."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import WISHES, control_of, model, oracle
from stepped import Stepped, ask
from test_schedules import LENGTHS, NEW, TEXTS, arrivals, play_out, request_of

from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.request import Drawing, Request
from mor_jax.inference.engine.stats import compiled_here

GREEDY = Drawing(temperature=0.0)


@functools.cache
def device():
    """Three lanes, of which two are too small for what some requests need."""
    config = EngineConfig(lanes=3, chunks=(8,), boundary_every=2, entries=40, max_logprobs=4)
    made = Device(*model(), config)
    # too few, so that lanes are outgrown
    made.expected_entries = lambda tokens, mean_depth=None: tokens // 2
    made.warm_up()
    return made


def service(**config):
    return Stepped(device(), control_of=control_of, **config)


@functools.cache
def alone(request):
    s = service(prefix_bytes=0)
    heard = ask(s, request)
    s.run()
    return heard.tokens


met = dict.fromkeys(("preempted", "cached", "sampled"), 0)


schedules = given(
    st.sampled_from([4, 24, 256]),
    st.sampled_from([0, 6000, None]),
    st.sampled_from([1, 8, 1000]),
    st.lists(arrivals, min_size=2, max_size=8),
)


def any_schedule(round_tokens, prefix_bytes, hold_tokens, schedule):
    s = service(round_tokens=round_tokens, prefix_bytes=prefix_bytes, hold_tokens=hold_tokens)
    for a, heard in play_out(s, schedule):
        request, sampled = request_of(a), a["seed"] is not None
        full = Request(request.prompt, NEW, request.drawing, depth=request.depth)
        want = alone(full) if sampled else oracle(request.prompt, request.depth)
        assert heard.tokens == want[: len(heard.tokens)]
        assert len(heard.tokens) == a["new"] or heard.end.reason != "length"
        met["preempted"] += heard.end.preempted
        met["cached"] += heard.end.cached_tokens
        met["sampled"] += sampled


@pytest.mark.parametrize("m", [2, 1, 3])
def test_tokens_are_those_of_plain_decoding_in_any_schedule(m):
    """Neither depth-wise nor lock-step; depth-wise; lock-step."""
    met.update(dict.fromkeys(met, 0))
    made = device()
    tick = made._programs.tick
    try:
        if m != made.m:
            made._programs.compile_tick(m, 1)
        settings(max_examples=30)(schedules(any_schedule))()
    finally:
        made._programs.tick = tick
    assert all(n > 5 for n in met.values()), f"the schedules hardly met some of these: {met}"


def test_a_prefix_from_the_cache_changes_no_bit():
    """Log-probabilities of a prompt that was computed, of one whose head was found, and in
    company."""
    want = Request(TEXTS[0][:41], 10, GREEDY, logprobs=4)
    found = []
    for head, company in ((None, 0), (TEXTS[0][:37], 0), (TEXTS[0][:41], 4)):
        s = service(prefix_bytes=1 << 24)
        if head:
            ask(s, Request(head, 1, GREEDY))
            s.run()
        others = [ask(s, Request(TEXTS[1][: 9 + i], 7, Drawing(seed=i))) for i in range(company)]
        heard = ask(s, want)
        s.run()
        assert all(o.over for o in others)
        found.append((heard.end.cached_tokens, [e for e in heard.events[:-1]]))
    assert [n for n, _ in found] == [0, 32, 40]
    assert found[0][1] == found[1][1] == found[2][1], "to the last bit"


def test_nothing_compiles_once_it_is_warm():
    s = service()
    before = compiled_here()
    for wish in WISHES:
        for n in LENGTHS:
            ask(
                s,
                Request(
                    TEXTS[2][:n],
                    5,
                    Drawing(seed=n, top_k=3),
                    depth=wish,
                    logprobs=2,
                    priority=n % 2,
                ),
            )
    s.run()
    assert compiled_here() == before and s.stats()["compilations_total"] == 0


def test_compilations_are_counted():
    import jax

    before = compiled_here()
    jax.jit(lambda x: x * 3 + np.float32(before))(np.ones((7,), np.float32))
    assert compiled_here() == before + 1
