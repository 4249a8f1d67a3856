"""Whatever happens around it, every request's tokens are those of plain decoding, and nothing stays
behind."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CONTEXT, VOCAB, WISHES, ReferenceDevice, control_of, oracle
from stepped import ROUNDS, Stepped, ask

from mor_jax.inference.engine.request import Drawing, Request

GREEDY = Drawing(temperature=0.0)
TEXTS = [tuple(np.random.default_rng(i).integers(0, VOCAB, 48).tolist()) for i in range(2)]
# shares a head with the first, not a multiple of any chunk
TEXTS.append((*TEXTS[0][:20], *TEXTS[1][20:]))
LENGTHS = (1, 5, 17, 22, 41)
NEW = 14

arrivals = st.fixed_dictionaries(
    {
        "after": st.sampled_from([0, 0, 0, 1, 3, 8]),  # rounds since the one before
        "text": st.sampled_from(range(len(TEXTS))),
        "length": st.sampled_from(LENGTHS),
        # many outgrow a small lane, so that one has to make room
        "new": st.just(NEW) | st.integers(1, NEW),
        "wish": st.sampled_from([WISHES[0], *WISHES]),
        "priority": st.sampled_from([0, 0, 1, -1]),
        "deadline": st.sampled_from([None, None, None, 6.0]),
        # rounds after it came
        "leaves": st.sampled_from([None, None, None, ("cancel", 0), ("cancel", 4), ("finish", 7)]),
        "seed": st.sampled_from([None, None, 5]),
    }
)
engines = st.fixed_dictionaries(
    {
        "rooms": st.sampled_from(
            [
                (192, 24, 24, 24),
                (192, 24, 24),
                (192, 24, 40),
                (192, 40, 40, 40),
                (192,),
                (192, 192, 192),
            ]
        ),
        "chunks": st.sampled_from([(4, 16), (1,), (8,), (3, 64)]),
        "m": st.integers(1, 3),
        "expect": st.sampled_from([0.3, 0.3, 1.7]),  # recursions a token, as the device says
        "round_tokens": st.sampled_from([1, 8, 24, 256]),
        "prefix_bytes": st.sampled_from([0, 100, 700, None]),
        "hold_tokens": st.sampled_from([1, 8, 1000]),
        "keep_tokens": st.sampled_from([1, 1, 5]),
    }
)


def request_of(a):
    drawing = GREEDY if a["seed"] is None else Drawing(temperature=1.3, seed=a["seed"])
    return Request(
        TEXTS[a["text"]][: a["length"]],
        a["new"],
        drawing,
        depth=a["wish"],
        priority=a["priority"],
        deadline_s=a["deadline"],
    )


def alone(request, memo={}):  # noqa: B006
    """Tokens of a request that has an engine for itself."""
    key = (request.prompt, request.drawing, request.depth)
    if key not in memo:
        service = Stepped(ReferenceDevice((3 * CONTEXT,)), control_of=control_of, prefix_bytes=0)
        heard = ask(service, Request(request.prompt, NEW, request.drawing, depth=request.depth))
        service.run()
        memo[key] = heard.tokens
    return memo[key]


met = dict.fromkeys(("preempted", "cached", "held", "left", "late", "whole"), 0)


@settings(max_examples=400)
@given(engines, st.lists(arrivals, min_size=1, max_size=9))
def any_schedule(engine, schedule):
    device = ReferenceDevice(
        engine["rooms"], chunks=engine["chunks"], m=engine["m"], expect=engine["expect"]
    )
    config = {k: engine[k] for k in ("round_tokens", "prefix_bytes", "hold_tokens", "keep_tokens")}
    service = Stepped(device, control_of=control_of, **config)
    came, leaving = [], []
    for a in schedule:
        for _ in range(a["after"]):
            service.step()
            leaving = leave(leaving, service.now)
        heard = ask(service, request_of(a))
        came.append((a, heard))
        if a["leaves"]:
            leaving.append((service.now + a["leaves"][1], heard, a["leaves"][0]))
            leaving = leave(leaving, service.now)
    for _ in range(ROUNDS):
        if not service.step():
            break
        leaving = leave(leaving, service.now)
    assert service.is_clean() and not device.open_tickets
    for a, heard in came:
        check(a, heard)
    met["held"] += service._scheduler.held_back


def test_tokens_are_those_of_plain_decoding_in_any_schedule():
    any_schedule()
    assert all(n > 20 for n in met.values()), f"the schedules hardly met some of these: {met}"


def leave(leaving, now):
    for when, heard, how in leaving:
        if when <= now:
            getattr(heard.ticket, how)()
    return [x for x in leaving if x[0] > now]


def play_out(service, schedule):
    """[(arrival, what its request heard)] when there is nothing left to do. An arrival may bring
    its `request` along."""
    came, leaving = [], []
    for a in schedule:
        for _ in range(a["after"]):
            service.step()
        heard = ask(service, a.get("request") or request_of(a))
        came.append((a, heard))
        if a["leaves"]:
            leaving.append((service.now + a["leaves"][1], heard, a["leaves"][0]))
    for _ in range(ROUNDS):
        leaving = leave(leaving, service.now)
        if not service.step():
            break
    assert service.is_clean()
    return came


def check(a, heard):
    request, end = request_of(a), heard.end
    want = oracle(request.prompt, request.depth)[:NEW] if a["seed"] is None else alone(request)
    assert heard.tokens == want[: len(heard.tokens)]
    whole = len(heard.tokens) == a["new"]
    allowed = {"length"} if whole else set()
    allowed |= (
        {"cancel": {"cancelled"}, "finish": {"stop"}}[a["leaves"][0]] if a["leaves"] else set()
    )
    allowed |= {"deadline"} if a["deadline"] else set()
    assert end.reason in allowed and end.error is None
    assert (end.prompt_tokens, end.completion_tokens) == (a["length"], len(heard.tokens))
    assert 0 <= end.cached_tokens < a["length"]
    met["preempted"] += end.preempted
    met["cached"] += end.cached_tokens
    met["left"] += end.reason in ("cancelled", "stop")
    met["late"] += end.reason == "deadline"
    met["whole"] += end.reason == "length"
