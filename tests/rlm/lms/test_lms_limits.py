"""Limits hold exactly, over tasks, loops and threads, and a cancelled waiter leaves no trace."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm.fake_server import FakeServer

from rlm_runtime.lms.base import Message
from rlm_runtime.lms.limits import Bucket, Gate
from rlm_runtime.lms.openai import OpenAILM


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(1, 600),
    st.floats(1, 50),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 40)), min_size=1, max_size=30),
)
def test_a_bucket_never_lets_through_more_than_rate_and_burst(per_minute, burst, takes):
    clock = Clock()
    bucket = Bucket(per_minute, burst, clock)
    used = []
    for pause, amount in takes:
        clock.now += pause
        used.append((clock.now + bucket.take(amount), amount))
    assert [at for at, _ in used] == sorted(at for at, _ in used), "first come, first served"
    for start, (begin, _) in enumerate(used):
        total = 0
        for at, amount in used[start:]:
            total += amount
            assert total <= burst + (at - begin) * per_minute / 60 + used[start][1] + 1e-6


def test_a_bucket_gives_back_and_none_means_no_limit():
    clock = Clock()
    bucket = Bucket(60, 1, clock)
    assert bucket.take(1) == 0 and bucket.take(1) == 1
    bucket.give_back(1)
    assert bucket.take(1) == 1
    assert Bucket(None).take(10**9) == 0


def test_a_cancelled_wait_costs_nothing():
    async def main():
        bucket = Bucket(60, 1, clock)
        await bucket.wait(1)
        task = asyncio.create_task(bucket.wait(1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return bucket.take(1)

    clock = Clock()
    assert asyncio.run(main()) == 1


def test_requests_a_minute_over_http():
    """With an empty bucket ten requests at 1200 a minute take the time they must."""

    async def main(lm):
        lm.endpoint.requests.take(lm.endpoint.requests.burst)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*[lm.complete([Message(role="user", content="x")]) for _ in range(10)])
        return loop.time() - began

    with FakeServer("ok") as server:
        assert (
            asyncio.run(main(OpenAILM("m", base_url=server.url, requests_per_minute=1200))) >= 0.45
        )


def test_tokens_a_minute_are_settled_by_the_usage():
    with FakeServer("ok") as server:
        lm = OpenAILM("m", base_url=server.url, tokens_per_minute=60)  # the burst is 10
        bucket = lm.endpoint.tokens
        bucket._clock = lambda: bucket._at  # time stands still
        reply = asyncio.run(lm.complete([Message(role="user", content="x")]))
    assert bucket._level == pytest.approx(10 - reply.usage.input_tokens - reply.usage.output_tokens)


def test_a_gate_holds_over_threads_with_loops_of_their_own():
    gate, most, now, lock = Gate(3), 0, 0, threading.Lock()

    async def use():
        nonlocal most, now
        async with gate:
            with lock:
                now += 1
                most = max(most, now)
            await asyncio.sleep(0.001)
            with lock:
                now -= 1

    async def many():
        await asyncio.gather(*[use() for _ in range(20)])

    threads = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert most == 3 and now == 0 and gate.held == 0 and not gate._waiting


@given(st.lists(st.sampled_from(["enter", "cancel", "leave"]), max_size=40))
def test_a_gate_keeps_its_count_however_waiters_are_cancelled(steps):
    async def main():
        gate, holding, waiting = Gate(2), [], []

        async def hold(leave):
            async with gate:
                await leave.wait()

        for step in steps:
            if step == "enter":
                leave = asyncio.Event()
                waiting.append((asyncio.create_task(hold(leave)), leave))
            elif step == "cancel" and waiting:
                waiting.pop()[0].cancel()
            elif step == "leave" and waiting:
                waiting[0][1].set()
                holding.append(waiting.pop(0))
            if len(steps) % 2:  # sometimes nothing runs between two steps
                await asyncio.sleep(0)
            assert gate.held <= 2
        for _, leave in waiting:
            leave.set()
        await asyncio.wait_for(
            asyncio.gather(*[t for t, _ in (*waiting, *holding)], return_exceptions=True), 20
        )
        for _ in range(3):
            await asyncio.sleep(0)
        assert gate.held == 0 and not gate._waiting

    asyncio.run(main())


def test_a_place_handed_to_a_waiter_that_is_cancelled_is_passed_on():
    async def main():
        gate = Gate(1)
        await gate.__aenter__()
        waiter = asyncio.create_task(gate.__aenter__())
        await asyncio.sleep(0)
        await gate.__aexit__()  # the waiter has the place now, and does not know it yet
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert gate.held == 0
        await asyncio.wait_for(gate.__aenter__(), 20)

    asyncio.run(main())


def test_a_gate_whose_waiters_loop_has_ended_goes_on():
    gate = Gate(1)

    async def abandon():
        await gate.__aenter__()
        waiter = asyncio.ensure_future(gate.__aenter__())
        await asyncio.sleep(0)
        return waiter

    loop = asyncio.new_event_loop()
    waiter = loop.run_until_complete(abandon())
    loop.close()  # with a task still waiting in it

    async def main():
        await gate.__aexit__()
        await asyncio.wait_for(gate.__aenter__(), 20)

    asyncio.run(main())
    assert gate.held == 1
    waiter.get_coro().close()
    waiter._log_destroy_pending = False
