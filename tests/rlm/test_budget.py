"""The ledger never passes a limit, refuses only what is really used up, and gives back what calls
did not use."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_runtime.budget import LAST_CALL_SHARE, LAST_CALL_TOKENS, Budget, Ledger
from rlm_runtime.errors import BudgetExceeded
from rlm_runtime.lms.base import Usage


def price(input_tokens, output_tokens):
    return input_tokens * 1e-6 + output_tokens * 4e-6


def used(n_in, n_out):
    return Usage(calls=1, input_tokens=n_in, output_tokens=n_out)


async def drive(ledger, calls):
    """Run calls (input, wanted output, real output, fails) at once; what each came to."""
    passed = []

    def check():
        b = ledger.budget
        held = ledger._held_in, ledger._held_out, ledger._held_usd
        for limit, total in [
            (b.input_tokens, ledger.total.input_tokens + held[0]),
            (b.output_tokens, ledger.total.output_tokens + held[1]),
            (b.usd, (ledger.total.cost_usd or 0) + held[2]),
            (b.sub_calls, ledger.sub_calls),
        ]:
            if limit is not None:
                passed.append(total)
                assert total <= limit * (1 + 1e-9)

    async def one(n_in, want, real, fails):
        try:
            r = await ledger.reserve(calls=1, input_tokens=n_in, max_tokens=want, price=price)
        except BudgetExceeded as e:
            return e.limit
        check()
        await asyncio.sleep(0)
        if fails:
            r.release()
            return "failed"
        bound = r.max_tokens if r.max_tokens is not None else real
        spent = used(n_in, min(real, bound))
        r.settle(spent, depth=1)
        check()
        return spent

    async with asyncio.timeout(20):  # nobody sleeps for ever
        return await asyncio.gather(*(one(*c) for c in calls))


CALLS = st.lists(
    st.tuples(
        st.integers(0, 400),
        st.one_of(st.none(), st.integers(1, 300)),
        st.integers(1, 300),
        st.booleans(),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(
    calls=CALLS,
    sub_calls=st.one_of(st.none(), st.integers(0, 60)),
    input_tokens=st.one_of(st.none(), st.integers(1, 5000)),
    output_tokens=st.one_of(st.none(), st.integers(1, 5000)),
    usd=st.one_of(st.none(), st.floats(1e-5, 0.02)),
)
def test_no_limit_is_passed_and_no_call_hangs(calls, sub_calls, input_tokens, output_tokens, usd):
    budget = Budget(
        sub_calls=sub_calls,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        usd=usd,
        reply_tokens=200,
    )
    ledger = Ledger(budget)
    outcomes = asyncio.run(drive(ledger, calls))
    spent = [o for o in outcomes if isinstance(o, Usage)]
    assert ledger.total.input_tokens == sum(u.input_tokens for u in spent)
    assert ledger.total.output_tokens == sum(u.output_tokens for u in spent)
    assert ledger.by_depth.get(1, Usage()).output_tokens == ledger.total.output_tokens
    assert ledger.sub_calls == sum(isinstance(o, Usage) or o == "failed" for o in outcomes)
    assert (ledger._in_flight, ledger._held_in, ledger._held_out, ledger._held_usd) == (0, 0, 0, 0)
    if sub_calls is None and input_tokens is None and output_tokens is None and usd is None:
        assert not [o for o in outcomes if isinstance(o, str) and o != "failed"]


def test_sub_calls_are_exact_under_concurrency():
    ledger = Ledger(Budget(sub_calls=100))
    outcomes = asyncio.run(drive(ledger, [(10, None, 5, False)] * 250))
    assert sum(isinstance(o, Usage) for o in outcomes) == 100
    assert outcomes.count("sub_calls") == 150


def test_output_tokens_are_hit_exactly():
    """37 tokens a reply into 1,000: 27 whole replies, one cut to the 1 that is left, the rest
    refused."""
    ledger = Ledger(Budget(output_tokens=1000))
    outcomes = asyncio.run(drive(ledger, [(10, 50, 37, False)] * 200))
    assert ledger.total.output_tokens == 1000
    assert [o.output_tokens for o in outcomes if isinstance(o, Usage)].count(37) == 27
    assert outcomes.count("output_tokens") == 200 - 28


def test_input_tokens_are_used_to_the_last_whole_call():
    ledger = Ledger(Budget(input_tokens=1000))
    outcomes = asyncio.run(drive(ledger, [(30, 10, 10, False)] * 100))
    assert ledger.total.input_tokens == 990
    assert outcomes.count("input_tokens") == 100 - 33


def test_dollars_are_used_until_nothing_more_can_be_bought():
    ledger = Ledger(Budget(usd=0.01))
    outcomes = asyncio.run(drive(ledger, [(100, 64, 64, False)] * 200))
    assert 0.01 - price(100, 1) < ledger.total.cost_usd <= 0.01 + 1e-12
    assert "usd" in outcomes


def test_a_call_waits_for_what_others_may_give_back():
    async def main():
        ledger = Ledger(Budget(output_tokens=100))
        first = await ledger.reserve(max_tokens=100)
        second = asyncio.create_task(ledger.reserve(max_tokens=80))
        await asyncio.sleep(0)
        assert not second.done()
        first.settle(used(1, 10))
        assert (await second).max_tokens == 80

    asyncio.run(main())


def test_a_cancelled_waiter_leaves_nothing_behind():
    async def main():
        ledger = Ledger(Budget(output_tokens=100))
        first = await ledger.reserve(max_tokens=100)
        waiting = asyncio.create_task(ledger.reserve(max_tokens=80))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        first.release()
        assert (await ledger.reserve(max_tokens=100)).max_tokens == 100

    asyncio.run(main())


def test_the_last_call_has_room_that_others_cannot_take():
    async def main():
        ledger = Ledger(Budget(output_tokens=10_000, input_tokens=1000))
        ledger.keep_for_last_call(200)
        taken = await ledger.reserve(max_tokens=10_000, input_tokens=800)
        assert taken.max_tokens == 10_000 - LAST_CALL_TOKENS
        taken.settle(used(800, taken.max_tokens))
        with pytest.raises(BudgetExceeded) as e:
            await ledger.reserve(max_tokens=5)
        assert e.value.limit == "output_tokens"
        last = await ledger.reserve(max_tokens=5000, input_tokens=200, last=True)
        assert last.max_tokens == LAST_CALL_TOKENS

    asyncio.run(main())


def test_what_is_kept_back_is_a_share_at_most():
    async def main():
        ledger = Ledger(Budget(output_tokens=100))
        ledger.keep_for_last_call(10**9)
        assert (await ledger.reserve(max_tokens=1000)).max_tokens == 100 - 100 * LAST_CALL_SHARE

    asyncio.run(main())


def test_a_call_that_was_sent_and_failed_still_counts():
    async def main():
        ledger = Ledger(Budget(sub_calls=1, output_tokens=50))
        (await ledger.reserve(calls=1, max_tokens=50)).release()
        assert (ledger.sub_calls, ledger.total.output_tokens) == (1, 0)
        with pytest.raises(BudgetExceeded):
            await ledger.reserve(calls=1)

    asyncio.run(main())


def test_settling_twice_charges_once():
    async def main():
        ledger = Ledger()
        r = await ledger.reserve(input_tokens=5)
        r.settle(used(5, 5))
        r.settle(used(5, 5))
        r.release()
        assert ledger.total.calls == 1

    asyncio.run(main())


def test_a_reply_without_usage_is_charged_the_estimate():
    async def main():
        ledger = Ledger(Budget(output_tokens=100))
        r = await ledger.reserve(input_tokens=7, max_tokens=9)
        r.settle(Usage())
        assert (ledger.total.input_tokens, ledger.total.output_tokens) == (7, 9)

    asyncio.run(main())


def test_depth_is_a_limit():
    ledger = Ledger(Budget(depth=1))
    ledger.check_depth(1)
    with pytest.raises(BudgetExceeded, match="depth"):
        ledger.check_depth(2)


@pytest.mark.parametrize(
    "bad", [{"turns": 0}, {"usd": -1}, {"seconds": 0}, {"output_tokens": 0}, {"dollars": 1}]
)
def test_impossible_budgets_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Budget(**bad)
