"""Cancelling: by handle, event, task or Ctrl-C, at any moment. Nothing is left running, and there
is a result."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import ScriptedLM, cell, done, echo, rlm, types
from rlm_runtime.errors import LMError
from rlm_runtime.trajectory import read


def busy(**options):
    """A tree that goes on for ever: batches, children, tools, and a draft of an answer."""

    def lead(messages):
        if len(messages) == 1:
            return "a"
        return cell(
            "answer['content'] = 'draft'\nllm_batch(['x'] * 10)\nrlm_batch(['y'] * 3)\npause()"
        )

    async def pause():
        await asyncio.sleep(0.003)

    model = ScriptedLM(lead, latency=0.002)
    return rlm(
        model,
        model,
        max_depth=2,
        budget={"turns": 10_000},
        tools=[pause],
        sub_tools=[pause],
        **options,
    )


async def others():
    """Tasks that are left of a run, after the loop had a moment."""
    for _ in range(50):
        left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        if not left:
            return []
        await asyncio.sleep(0.01)
    return left


def balanced(events):
    """Every node that started has ended."""
    starts = [e.node for e in events if e.type == "node_start"]
    ends = [e.node for e in events if e.type == "node_end"]
    return sorted(starts) == sorted(ends)


def test_a_handle_cancels_and_gives_what_there_is():
    async def main():
        run = busy().start("text")
        await asyncio.sleep(0.05)
        run.cancel()
        run.cancel()
        result = await run.result()
        assert (result.stop_reason, result.partial, result.answer) == ("cancelled", True, "draft")
        assert types(result)[-1] == "run_end" and balanced(result.events)
        assert not await others() and not FakeEnvironment.live

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(12))
def test_at_any_moment(seed):
    """After a random time, from before the first call to the middle of a tree of children."""

    async def main():
        run = busy().start("text")
        for _ in range(random.Random(seed).choice([0, 1, 2, 3, 5, 10, 40, 200, 700])):
            await asyncio.sleep(0)
        await asyncio.sleep(random.Random(seed).random() * 0.03)
        run.cancel()
        async with asyncio.timeout(20):
            result = await run.result()
        assert result.stop_reason == "cancelled"
        assert (
            types(result)[0] == "run_start"
            and types(result)[-1] == "run_end"
            and balanced(result.events)
        )
        assert not await others() and not FakeEnvironment.live

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(6))
def test_cancelling_the_task(seed, tmp_path):
    async def main():
        task = asyncio.create_task(busy(log_dir=tmp_path).acompletion("text"))
        await asyncio.sleep(random.Random(seed).random() * 0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await task
        assert not await others() and not FakeEnvironment.live
        for folder in tmp_path.iterdir():
            events = read(folder)
            assert (
                events[-1].type == "run_end"
                and events[-1].stop_reason == "cancelled"
                and balanced(events)
            )

    asyncio.run(main())


def test_the_cancelled_error_carries_the_partial_result():
    async def main():
        async def inner():
            try:
                await busy().acompletion("text")
            except asyncio.CancelledError as e:
                return e.result

        task = asyncio.create_task(inner())
        await asyncio.sleep(0.05)
        task.cancel()
        assert (await task).answer == "draft"

    asyncio.run(main())


def test_a_timeout_around_a_completion_is_a_timeout():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await busy().acompletion("text")
        assert not await others()

    asyncio.run(main())


def test_the_end_of_the_loop_ends_the_run(tmp_path):
    async def main():
        busy(log_dir=tmp_path).start("text")
        await asyncio.sleep(0.03)

    asyncio.run(main())
    assert not FakeEnvironment.live
    [folder] = tmp_path.iterdir()
    assert read(folder)[-1].stop_reason == "cancelled"


def test_a_caller_who_gives_up_does_not_cancel_a_run_that_has_a_handle():
    async def main():
        run = rlm(ScriptedLM([done("1")], latency=0.03)).start("text")
        waiter = asyncio.create_task(run.result())
        await asyncio.sleep(0)
        waiter.cancel()
        assert (await run.result()).answer == 1

    asyncio.run(main())


@pytest.mark.parametrize("kind", [threading.Event, asyncio.Event])
def test_an_event_cancels(kind):
    event = kind()
    model = busy(on_event=lambda e: e.type == "cell_start" and event.set())
    result = model.completion("text", cancel=event)
    assert result.stop_reason == "cancelled" and not FakeEnvironment.live


def test_an_event_that_is_set_before():
    event = threading.Event()
    event.set()
    result = busy().completion("text", cancel=event)
    assert result.stop_reason == "cancelled" and types(result)[-1] == "run_end"


def test_a_cell_that_finished_its_answer_before_the_cancel_has_answered():
    event = threading.Event()
    code = "answer.update(content='all of it', ready=True)\nstop()\nwhile True: pass"
    result = rlm([cell(code)], tools={"stop": event.set}).completion("text", cancel=event)
    assert (result.answer, result.stop_reason, result.partial) == ("all of it", "answered", False)


def test_a_model_that_swallows_the_cancellation_does_not_hold_the_run(monkeypatch):
    from rlm_runtime.rlm import run as module

    monkeypatch.setattr(module, "CANCEL_SECONDS", 0.2)

    async def stubborn(messages):
        for _ in range(30):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)
        return "late"

    async def main():
        run = rlm(ScriptedLM(stubborn)).start("text")
        await asyncio.sleep(0.02)
        run.cancel()
        async with asyncio.timeout(1.5):
            assert (await run.result()).stop_reason == "cancelled"

    asyncio.run(main())


def test_calls_after_the_end_are_refused():
    """A thread that a cell left behind asks after the run: it gets an error, and no model is
    asked."""
    kept = []

    class Leaky(FakeEnvironment):
        async def run(self, code, handler):
            kept.append(handler)
            return await super().run(code, handler)

    async def main():
        from rlm_runtime.repl.base import Request

        sub = echo()
        model = rlm([done("1")], sub, environment=Leaky)
        await model.acompletion("text")
        [outcome] = await kept[0](Request(method="llm", prompts=("x",)))
        assert outcome.kind == "cancelled" and sub.count == 0

    asyncio.run(main())


def test_lm_failure_while_children_run_ends_them():
    calls = 0

    def lead(messages):
        nonlocal calls
        calls += 1
        if calls == 1:
            return cell("rs = rlm_batch(['a'] * 4)")
        if calls > 12:
            raise LMError("down", kind="connection")
        return cell("llm_batch(['x'] * 3)")

    model = ScriptedLM(lead, latency=0.001)
    with pytest.raises(LMError) as e:
        rlm(model, model, max_depth=2).completion("text")
    assert balanced(e.value.result.events) and not FakeEnvironment.live


PROGRAM = """
import sys, signal
# Whoever runs the tests in the background has SIGINT ignored, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [{tests!r}]
from rlm.loop_helpers import cell, rlm, ScriptedLM

def ready(event):
    if event.type == "cell_start":
        print("ready", flush=True)

def main(how):
    model = rlm(ScriptedLM([cell("answer['content'] = 'draft'\\nwhile True: llm_query('x')")]), on_event=ready)
    if how == "session":
        with model.session() as s:
            return s.completion("text")
    if how == "loop":
        import asyncio
        async def inside():
            return model.completion("text")
        return asyncio.run(inside())
    return model.completion("text")

result = main(sys.argv[1])
print(result.stop_reason, result.partial, result.answer, flush=True)
"""


@pytest.mark.parametrize("how", ["plain", "session", "loop"])
def test_ctrl_c_returns_the_partial_result(how, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM.format(tests=str(Path(__file__).parents[1]))))
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, program, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert out.split() == ["cancelled", "True", "draft"], err
    assert process.returncode == 0
