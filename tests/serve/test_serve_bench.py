"""The load generator: against the server itself, and its figures against known ones."""

import asyncio

import pytest

from benchmarks.serve_load import Outcome, Plan, Workload, measure, open_loop, quantiles, summary
from rlm_runtime.errors import UsageError


def test_rounds_against_the_server(server):
    workload = Workload("small", prompt=4, prefix=3, output=3, vocab=200)
    said = []
    plan = Plan(server.url, workload, requests=6, concurrency=3, loads=(0.5,))
    found = asyncio.run(measure(plan, said.append))
    assert [r["ok"] for r in found["rounds"]] == [6, 6] and len(said) == 2
    for r in found["rounds"]:
        assert r["output_tokens_per_second"] * r["seconds"] == pytest.approx(18, rel=0.05)
        assert r["prompt_tokens_per_second"] * r["seconds"] == pytest.approx(6 * 7, rel=0.05)
        assert 0 < r["ttft_ms"]["p50"] <= r["total_ms"]["p99"] and not r["failures"]
    assert found["rounds"][1]["rate"] == pytest.approx(
        found["rounds"][0]["requests_per_second"] / 2, rel=1e-3
    )


def test_a_server_that_refuses_is_an_error(server):
    with pytest.raises(UsageError, match="404"):
        asyncio.run(measure(Plan(server.url, Workload("other"))))
    with pytest.raises(UsageError, match="does not answer"):
        asyncio.run(measure(Plan("http://127.0.0.1:9/v1", Workload("other"))))


def test_prompts_share_the_prefix_and_nothing_else():
    first, second = (
        Workload("m", prompt=20, prefix=30, vocab=1000).body(i)["prompt"] for i in (0, 1)
    )
    assert first[:30] == second[:30] and first[30:] != second[30:] and len(first) == 50
    text = Workload("m", prompt=2, prefix=3).body(0)["prompt"]
    assert len(text.split()) == 5 and text == Workload("m", prompt=2, prefix=3).body(0)["prompt"]


def test_arrivals_are_poisson_whatever_the_answers_take():
    """Requests are sent at their times although none has been answered."""
    sent = []

    async def main():
        loop = asyncio.get_running_loop()
        gate = asyncio.Event()

        async def ask(number):
            sent.append((number, loop.time()))
            if len(sent) == 40:
                gate.set()
            await gate.wait()
            return Outcome(status=200)

        return await open_loop(ask, 40, rate=400.0)

    outcomes = asyncio.run(main())
    assert len(outcomes) == 40 and sorted(n for n, _ in sent) == list(range(40))
    assert [n for n, _ in sorted(sent, key=lambda x: x[1])] == [n for n, _ in sent]


def test_figures():
    assert quantiles([None]) is None
    assert quantiles([i / 1e3 for i in range(1, 101)]) == {
        "mean": 50.5,
        "p50": 51,
        "p90": 91,
        "p99": 100,
        "max": 100,
    }
    outcomes = [
        # good: 0.1 s a token
        Outcome(status=200, first=0.5, total=1.4, tokens=10, prompt_tokens=8, cached_tokens=4),
        # its first token came late
        Outcome(status=200, first=2.0, total=2.9, tokens=10, prompt_tokens=8),
        Outcome(status=429, error="busy"),
    ]
    found = summary(outcomes, 2.0, goal_ttft=1.0, goal_gap=0.11)
    assert (
        found["ok"] == 2
        and found["goodput_requests_per_second"] == 0.5
        and found["good_share"] == 0.5
    )
    assert found["output_tokens_per_second"] == 10 and found["cached_share"] == 0.25
    assert found["failures"] == {"429 busy": 1}
