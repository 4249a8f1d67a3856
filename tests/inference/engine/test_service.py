"""What a request is told, who goes first, what frees a lane, and what a failure does; on the
reference device."""

import threading
import time

import numpy as np
import pytest
from reference import (
    CONFIG,
    CONTEXT,
    VOCAB,
    WISHES,
    ReferenceDevice,
    control_of,
    model,
    oracle,
    read,
)
from stepped import Heard, Stepped, ask

from mor_jax.errors import UserError
from mor_jax.inference.engine.request import (
    Drawing,
    Finished,
    PromptRead,
    PromptScored,
    QueueFull,
    Request,
    Token,
)
from mor_jax.inference.engine.rows import bit_mask
from mor_jax.inference.engine.service import EngineService, ServiceConfig

GREEDY = Drawing(temperature=0.0)
FULL = 3 * CONTEXT
TEXT = tuple(np.random.default_rng(0).integers(0, VOCAB, 48).tolist())
OTHER = tuple(np.random.default_rng(1).integers(0, VOCAB, 48).tolist())


def greedy(prompt, new, **more):
    return Request(tuple(prompt), new, GREEDY, **more)


def stepped(rooms=(FULL,), config=None, **device):
    return Stepped(ReferenceDevice(rooms, **device), control_of=control_of, eos=0, **(config or {}))


# ------------------------------------------------------------------------------------- what is told


def test_events_of_one_request_in_order_and_once_a_tick():
    service = stepped()
    heard = ask(service, greedy(TEXT[:22], 6, prompt_depths=True, logprobs=2))
    service.run()
    read_, *tokens, end = heard.events
    assert (
        isinstance(read_, PromptRead)
        and all(isinstance(t, Token) for t in tokens)
        and isinstance(end, Finished)
    )
    sequence = TEXT[:22] + heard.tokens
    depth = read(sequence[:-1], b"")[1]
    assert heard.depths == depth.tolist()
    assert end.reason == "length" and end.completion_tokens == 6 and end.cached_tokens == 0
    assert end.mean_depth == pytest.approx(depth.mean())
    assert heard.calls == 6, "the last token and the end come together"
    for i, token in enumerate(tokens):
        logits = read(sequence[: 22 + i], b"")[0][:VOCAB].astype(float)
        logprob = logits - np.log(np.exp(logits).sum())
        best = np.argsort(-logprob)[:2]
        assert token.logprob == pytest.approx(logprob[token.id], abs=1e-4)
        assert [t for t, _ in token.top] == best.tolist()
        np.testing.assert_allclose([x for _, x in token.top], logprob[best], atol=1e-4)


def test_depths_of_a_cached_prompt_are_told_too():
    service = stepped()
    first = ask(service, greedy(TEXT[:22], 3, prompt_depths=True))
    service.run()
    second = ask(service, greedy(TEXT[:22], 3, prompt_depths=True))
    service.run()
    assert second.depths == first.depths and second.end.cached_tokens == 21
    assert second.end.mean_depth == pytest.approx(np.mean(second.depths[21:])), (
        "of what was computed"
    )


def test_stop_tokens_and_their_least_place():
    plain = oracle(TEXT[:5])[:8]
    stop = plain[2]
    service = stepped()
    heard = ask(service, greedy(TEXT[:5], 8, stop_tokens=frozenset([stop])))
    late = ask(service, greedy(TEXT[:5], 8, stop_tokens=frozenset([stop]), min_tokens=5))
    service.run()
    at = plain.index(stop)
    assert (
        heard.tokens == plain[: at + 1] and heard.events[-2].stopped and heard.end.reason == "stop"
    )
    assert stop not in late.tokens[:5] and len(late.tokens) >= 5


def test_a_seed_draws_the_same_alone_and_in_company():
    want = Request(
        TEXT[:17], 12, Drawing(temperature=1.5, top_p=0.9, presence_penalty=0.5, seed=11)
    )
    alone = stepped()
    lone = ask(alone, want)
    alone.run()
    service = stepped((FULL,) * 3, {"round_tokens": 4}, m=2)
    others = [ask(service, Request(OTHER[: 3 + i], 9, Drawing(seed=i))) for i in range(4)]
    service.step()
    heard = ask(service, want)
    others += [ask(service, greedy(TEXT[:30], 20, depth=WISHES[1])) for _ in range(3)]
    service.run()
    assert heard.tokens == lone.tokens != ask_seed(want, 12)
    assert all(o.over for o in others)


def ask_seed(request, seed):
    service = stepped()
    heard = ask(
        service,
        Request(request.prompt, request.max_tokens, Drawing(temperature=1.5, top_p=0.9, seed=seed)),
    )
    service.run()
    return heard.tokens


class Sequence:
    """A grammar of one text. `breaks`: at which token it gives up."""

    def __init__(self, tokens, breaks=None):
        self.tokens, self.at, self.breaks = tokens, 0, breaks

    def allowed(self):
        return bit_mask([self.tokens[self.at]], VOCAB)

    def advance(self, token):
        if self.at == self.breaks:
            raise RuntimeError("a limit was met")
        assert token == self.tokens[self.at]
        self.at += 1

    @property
    def finished(self):
        return self.at == len(self.tokens)


def test_a_grammar_says_what_comes_and_when_it_is_over():
    service = stepped((FULL,) * 2)
    wanted = ask(service, greedy(TEXT[:5], 20, grammar=Sequence([9, 8, 7, 0])))
    short = ask(service, greedy(TEXT[:5], 2, grammar=Sequence([9, 8, 7, 0])))
    broken = ask(service, greedy(OTHER[:5], 20, grammar=Sequence([9, 8, 7, 0], breaks=2)))
    free = ask(service, greedy(OTHER[:9], 12))
    service.run()
    assert wanted.tokens == (9, 8, 7, 0) and wanted.end.reason == "stop"
    assert wanted.events[-2].stopped and not wanted.events[-3].stopped, "0 is the end of the text"
    assert short.tokens == (9, 8) and short.end.reason == "length"
    assert (
        broken.tokens == (9, 8, 7)
        and broken.end.reason == "error"
        and "a limit was met" in broken.end.error
    )
    assert free.tokens == oracle(OTHER[:9])[:12], "only the one is lost"
    assert service.is_clean() and service.healthy


class Scores:
    """Stands where the scorer of prompts does."""

    def warm_up(self):
        self.warm = True

    def steps(self, tokens, control=None):
        for _ in range(3):
            yield None
        yield PromptScored((None,) * len(tokens), ((),) * len(tokens))


def test_prompt_scores_come_before_the_first_token_and_others_go_on_meanwhile():
    service = Stepped(ReferenceDevice((FULL,)), scorer=Scores())
    scored = ask(service, greedy(TEXT[:5], 2, prompt_logprobs=True, logprobs=0))
    other = ask(service, greedy(OTHER[:5], 2))
    service.run()
    assert isinstance(scored.events[0], PromptScored) and len(scored.tokens) == 2
    assert scored.end.queued_s > other.end.queued_s
    with pytest.raises(UserError, match="without a scorer"):
        ask(stepped(), greedy(TEXT[:5], 2, prompt_logprobs=True, logprobs=0))
    with pytest.raises(UserError, match="logprobs is not set"):
        ask(service, greedy(TEXT[:5], 2, prompt_logprobs=True))


# ------------------------------------------------------------------------------------- who goes
# when


def test_priority_then_arrival():
    service = stepped()
    order = []
    for i, priority in enumerate([0, 5, -1, 0, 5, -1]):
        service.submit(
            greedy(TEXT[:5], 2, priority=priority),
            lambda events, i=i: isinstance(events[-1], Finished) and order.append(i),
        )
    service.run()
    assert order == [2, 5, 0, 3, 1, 4]


def test_siblings_wait_for_the_first_and_compute_the_shared_part_once():
    device = ReferenceDevice((FULL,) * 4, chunks=(4, 16))
    service = Stepped(device, hold_tokens=8)
    shared = TEXT[:32]
    heard = [ask(service, greedy((*shared, i, i), 3)) for i in range(8)]
    service.run()
    assert [h.tokens for h in heard] == [oracle((*shared, i, i))[:3] for i in range(8)]
    assert [h.end.cached_tokens for h in heard] == [0] + [32] * 7
    assert device.prefills == 2 + 8, "the shared chunks once, the tails each"
    stats = service.stats()
    assert (
        stats["prefix_cache_hits_total"] == 7 * 32 and stats["prefix_cache_queries_total"] == 8 * 33
    )
    assert stats["held_back_total"] == 7, "none of them computed what the first was computing"


def test_a_sibling_goes_on_by_itself_when_the_first_is_cancelled():
    service = stepped((FULL,) * 2, {"round_tokens": 4, "hold_tokens": 8}, chunks=(4,))
    first, second = (ask(service, greedy(TEXT[:30], 3)) for _ in range(2))
    service.step()
    first.ticket.cancel()
    service.run()
    assert first.end.reason == "cancelled" and second.tokens == oracle(TEXT[:30])[:3]


def test_other_depths_do_not_share_rows():
    service = stepped()
    for wish in (*WISHES, *WISHES):
        heard = ask(service, greedy(TEXT[:30], 5, depth=wish))
        service.run()
        assert heard.tokens == oracle(TEXT[:30], wish)[:5]
    assert service.stats()["prefix_cache_hits_total"] == 3 * 29


def test_who_outgrows_a_lane_moves_and_the_latest_makes_room():
    """The first two need more than the small lanes have; the third sits in the large one when they
    notice."""
    room = max(int(read(t[:22], b"")[1].sum()) for t in (TEXT, OTHER)) + 3
    service = stepped((FULL, room, room), expect=0.1)
    small = [ask(service, greedy(TEXT[:22], 30)), ask(service, greedy(OTHER[:22], 30))]
    service.step()
    late = ask(service, greedy(TEXT[24:30], 40))
    service.run()
    assert [h.tokens for h in small] == [oracle(TEXT[:22])[:30], oracle(OTHER[:22])[:30]]
    assert late.tokens == oracle(TEXT[24:30])[:40]
    assert [h.end.preempted for h in small] == [1, 1] and late.end.preempted == 1
    assert service.stats()["num_preemptions_total"] == 3 and service.is_clean()


def test_a_long_prompt_does_not_hold_up_who_decodes():
    """Between two of its chunks the others draw."""
    service = stepped((FULL,) * 2, {"round_tokens": 4, "prefix_bytes": 0}, chunks=(4,))
    running = ask(service, greedy(TEXT[:2], 40))
    for _ in range(5):
        service.step()
    long = ask(service, greedy(OTHER[:40], 1))
    before = len(running.tokens)
    while not long.over:
        service.step()
    assert len(running.tokens) - before >= 10, "ten chunks, a tick between each two"


# ------------------------------------------------------------------------------------- what ends a
# request


@pytest.mark.parametrize(("how", "reason"), [("cancel", "cancelled"), ("finish", "stop")])
def test_leaving_frees_the_lane(how, reason):
    service = stepped()
    first, waiting = ask(service, greedy(TEXT[:5], 50)), ask(service, greedy(OTHER[:5], 4))
    for _ in range(8):
        service.step()
    assert first.tokens and not waiting.events
    getattr(first.ticket, how)()
    getattr(first.ticket, how)()
    service.run()
    assert first.end.reason == reason and len(first.tokens) < 50
    assert waiting.tokens == oracle(OTHER[:5])[:4] and service.is_clean()
    first.ticket.cancel()  # after the end: nothing happens
    assert not service.step()


def test_a_deadline_ends_what_runs_and_what_waits():
    service = stepped()
    runs = ask(service, greedy(TEXT[:5], 50, deadline_s=8.0))
    waits = ask(service, greedy(OTHER[:5], 4, deadline_s=5.0))
    behind = ask(service, greedy(OTHER[:5], 4))
    service.run()
    assert runs.end.reason == waits.end.reason == "deadline"
    assert (
        0 < len(runs.tokens) < 50
        and not waits.tokens
        and waits.end.queued_s == pytest.approx(5, abs=1)
    )
    assert behind.tokens == oracle(OTHER[:5])[:4]


def test_a_listener_that_fails_loses_its_request_alone():
    service = stepped((FULL,) * 2)

    def failing_listener(events):
        raise ValueError("gone")

    service.submit(greedy(TEXT[:5], 50), failing_listener)
    other = ask(service, greedy(OTHER[:5], 20))
    service.run()
    assert other.tokens == oracle(OTHER[:5])[:20] and service.is_clean() and service.healthy
    assert service.stats()["generation_tokens_total"] < 30, "it was not drawn to its end"


# ------------------------------------------------------------------------------------- what is
# refused


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 1), "no tokens"),
        (Request((1,), 0), "max_tokens .* 0"),
        (Request((1,) * 60, 5), "60 tokens and 5 .* together 65; .* 64"),
        (Request((1, VOCAB), 5), f"token id {VOCAB}; ids go from 0 to {VOCAB - 1}"),
        (Request((1, -3), 5), "token id -3"),
        (Request((1,), 5, Drawing(temperature=-1)), "temperature"),
        (Request((1,), 5, logprobs=CONFIG.max_logprobs + 1), "logprobs"),
    ],
)
def test_what_can_never_run_is_refused_at_once(request_, message):
    service = stepped()
    with pytest.raises(UserError, match=message):
        service.submit(request_, Heard())
    assert not service.step()


def test_a_sequence_may_fill_the_context():
    service = stepped()
    heard = ask(service, greedy(TEXT[:40], CONTEXT - 40))
    service.run()
    assert heard.tokens == oracle(TEXT[:40]) and len(heard.tokens) == CONTEXT - 40


def test_a_full_queue_says_when_to_come_back():
    service = stepped(config={"queue": 3})
    for _ in range(3):
        ask(service, greedy(TEXT[:5], 4))
    with pytest.raises(QueueFull, match="3 requests wait") as e:
        ask(service, greedy(TEXT[:5], 4))
    assert e.value.retry_after_s >= 1
    service.step()  # one has a lane now
    ask(service, greedy(TEXT[:5], 4))
    service.run()
    assert ask(service, greedy(TEXT[:5], 4))


# ------------------------------------------------------------------------------------- its thread

LONG = 30.0  # seconds nobody comes near


class Event(Heard):
    def __init__(self):
        super().__init__()
        self.done = threading.Event()

    def __call__(self, events):
        super().__call__(events)
        if self.over:
            self.done.set()


def threaded(rooms=(FULL,) * 2, **config):
    return EngineService(
        ReferenceDevice(rooms), ServiceConfig(**{"keep_tokens": 1, **config}), control_of=control_of
    )


def test_requests_from_many_threads():
    service = threaded(idle_s=LONG)
    heard = [Event() for _ in range(12)]

    def client(i):
        service.submit(greedy(TEXT[: 3 + i % 3], 4), heard[i])

    clients = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for c in clients:
        c.start()
    assert all(h.done.wait(LONG) for h in heard)
    assert all(h.tokens == oracle(TEXT[: 3 + i % 3])[:4] for i, h in enumerate(heard))
    assert service.drain(LONG)
    with pytest.raises(UserError, match="closing"):
        service.submit(greedy(TEXT[:5], 1), Event())
    service.close()


def test_the_thread_ends_when_idle_and_comes_back():
    service = threaded(idle_s=0.0)
    for _ in range(2):
        heard = Event()
        service.submit(greedy(TEXT[:5], 3), heard)
        assert heard.done.wait(LONG) and heard.tokens == oracle(TEXT[:5])[:3]
        end = time.monotonic() + LONG
        while service._thread is not None:
            assert time.monotonic() < end
            time.sleep(0.001)
    assert service.device.warmed == 1


def gated(service):
    """Ticks wait for the gate."""
    gate, tick = threading.Event(), service.device.tick
    service.device.tick = lambda: (gate.wait(LONG), tick())[1]
    return gate


def test_draining_waits_for_what_runs_and_says_if_it_did_not_end():
    service = threaded()
    gate, heard = gated(service), [Event() for _ in range(5)]
    for h in heard:
        service.submit(greedy(TEXT[:5], 3), h)
    assert not service.drain(0.01)
    gate.set()
    assert service.drain(LONG) and all(h.end.reason == "length" for h in heard)


def test_closing_ends_everything_at_once():
    service = threaded()
    gate, heard = gated(service), [Event() for _ in range(5)]
    for h in heard:
        service.submit(greedy(TEXT[:5], 50), h)
    closing = threading.Thread(target=service.close)
    closing.start()
    gate.set()
    closing.join(LONG)
    assert all(h.end.reason == "error" and "closed" in h.end.error for h in heard)
    assert not closing.is_alive() and service.drain(0)
    again = EngineService(service.device)
    heard = Event()
    again.submit(greedy(TEXT[:5], 3), heard)
    assert heard.done.wait(LONG) and heard.tokens == oracle(TEXT[:5])[:3]


@pytest.mark.parametrize("where", ["warm_up", "open", "prefill", "start", "tick", "stop", "save"])
def test_a_failure_in_the_thread_ends_every_request_and_is_told_to_the_next(where):
    service = threaded((FULL,))
    calls, real = [], getattr(service.device, where)

    def fail(*args):
        calls.append(args)
        if len(calls) > (where != "warm_up"):
            raise RuntimeError("out of memory")
        return real(*args)

    setattr(service.device, where, fail)
    heard = [Event() for _ in range(6)]
    refused = 0
    for h in heard:
        try:
            service.submit(greedy(TEXT[:22], 4), h)
        except UserError:  # it failed already
            refused += 1
            h.done.set()
    assert all(h.done.wait(LONG) for h in heard)
    ended = [h for h in heard if h.events]
    assert len(ended) == 6 - refused
    assert any(h.end.reason == "error" and "out of memory" in h.end.error for h in ended)
    assert all(h.end.reason in ("error", "length") for h in ended)
    assert service.drain(LONG) and not service.healthy
    with pytest.raises(UserError, match=r"failed.*out of memory"):
        service.submit(greedy(TEXT[:5], 1), Event())


def test_metrics_by_the_names_of_the_documentation():
    service = stepped((FULL, FULL))
    for _ in range(3):
        ask(service, greedy(TEXT[:22], 5))
    assert service.stats()["num_requests_waiting"] == 3
    for _ in range(4):
        service.step()
    now = service.stats()
    assert (
        now["num_requests_running"] == 2
        and now["lane_occupancy"] == 1
        and 0 < now["kv_cache_usage_perc"] <= 1
    )
    service.run()
    then = service.stats()
    assert (
        then["num_requests_running"]
        == then["num_requests_waiting"]
        == then["kv_cache_usage_perc"]
        == 0
    )
    assert then["generation_tokens_total"] == 15 and then["prompt_tokens_total"] == 66
    assert then["requests_length_total"] == 3 and then["ticks_total"] >= 5
    assert sum(n for name, n in then.items() if name.startswith("recursion_depth_")) == 15
    assert 0 < then["mean_depth"] <= model()[0].program.recursions
    assert then["time_to_first_token_seconds_count_total"] == 3
