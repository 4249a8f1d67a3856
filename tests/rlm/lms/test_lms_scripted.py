"""ScriptedLM does what its tests will rely on."""

import asyncio

import pytest

from rlm_runtime.errors import LMError
from rlm_runtime.lms.base import Message, Reply, Sampling, Usage
from rlm_runtime.lms.scripted import ScriptedLM

HI = [Message(role="user", content="12345678")]


def test_a_list_in_order_then_an_error_that_says_so():
    lm = ScriptedLM(
        ["a", Reply(text="b", usage=Usage(calls=1, input_tokens=5)), LMError("no", kind="server")]
    )

    async def main():
        first, second = await lm.complete(HI), await lm.complete(HI)
        with pytest.raises(LMError, match=r"^no$"):
            await lm.complete(HI)
        with pytest.raises(LMError, match="3 replies; this was call 4"):
            await lm.complete(HI)
        return first, second

    first, second = asyncio.run(main())
    assert first.text == "a" and first.usage.input_tokens == 2 and first.usage.output_tokens == 1
    assert second.usage.input_tokens == 5 and lm.count == 4 and lm.messages[0] == tuple(HI)


def test_a_function_gets_what_it_asks_for():
    async def later(messages, sampling):
        return f"{messages[-1].content} {sampling.seed}"

    lm = ScriptedLM(later, usd_per_token=0.5)
    reply = asyncio.run(lm.complete(HI, sampling=Sampling(seed=3)))
    assert reply.text == "12345678 3" and reply.usage.cost_usd == 0.5 * (2 + 3)
    assert asyncio.run(ScriptedLM(lambda messages: "x", repeat_last=True).complete(HI)).text == "x"


def test_streaming_concurrency_and_cancelling_are_seen():
    lm = ScriptedLM(lambda m: "abcdefgh", latency=0.01, chunk=3)
    pieces = []

    async def main():
        await asyncio.gather(*[lm.complete(HI) for _ in range(5)])
        await lm.complete(HI, on_text=pieces.append)
        task = asyncio.create_task(lm.complete(HI))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert (
        lm.max_concurrency == 5
        and pieces == ["abc", "def", "gh"]
        and lm.cancelled == 1
        and lm.active == 0
    )
