"""Sessions: one REPL and one conversation for many completions."""

import asyncio
import threading

import pytest

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import ScriptedLM, cell, done, rlm, told, types
from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.trajectory import read


def test_variables_and_contexts_stay():
    script = [
        cell("kept = context.upper()"),
        done("kept"),
        done("[kept, context, context_1]"),
        done("context_2['a']"),
    ]
    root = ScriptedLM(script)
    with rlm(root).session() as s:
        assert s.completion("first", "one?").answer == "FIRST"
        assert s.completion("second", "two?").answer == ["FIRST", "first", "second"]
        assert s.completion({"a": 5}).answer == 5
        assert s.usage.calls == 4
    assert "two?" in told(root, 2) and "context_1" in told(root, 2)
    assert not FakeEnvironment.live


def test_the_conversation_goes_on():
    root = ScriptedLM([done("1"), done("2")])
    with rlm(root).session() as s:
        s.completion("a")
        s.completion("b")
    first, second = root.messages
    assert second[: len(first)] == first
    assert [m.role for m in second[len(first) :]] == ["assistant", "user"]


def test_an_old_answer_is_not_a_new_one():
    with rlm([done("1"), cell("print(answer)"), done("2")]).session() as s:
        assert s.completion("a").answer == 1
        result = s.completion("b")
        assert (result.answer, result.turns) == (2, 2)


def test_reset_begins_anew():
    root = ScriptedLM([done("1"), cell("context_1"), done("2")])
    with rlm(root).session() as s:
        s.completion("a")
        s.reset()
        assert s.completion("b").answer == 2
    assert len(root.messages[1]) == 2
    assert "NameError" in told(root)


def test_async():
    async def main():
        async with rlm([done("len(context)"), done("len(context_1)")]).session() as s:
            assert (await s.acompletion("abc")).answer == 3
            assert (await s.acompletion("abcd")).answer == 4

    asyncio.run(main())
    assert not FakeEnvironment.live


def test_completions_of_a_session_take_turns():
    async def main():
        model = rlm(ScriptedLM([done("1")], repeat_last=True, latency=0.002))
        async with model.session() as s:
            results = await asyncio.gather(*(s.acompletion(str(i)) for i in range(5)))
            assert [r.answer for r in results] == [1] * 5

    asyncio.run(main())


def test_the_budget_is_for_each_completion():
    code = "rs = llm_batch(list('abcde'))\nanswer.update(content=sum(isinstance(r, str) for r in rs), ready=True)"
    with rlm([cell(code), cell(code)], budget={"sub_calls": 3}).session() as s:
        assert [s.completion("a").answer, s.completion("b").answer] == [3, 3]


def test_one_record_for_the_session(tmp_path):
    with rlm([done("1"), cell("print(2)"), done("3")], log_dir=tmp_path).session() as s:
        first, second = s.completion("a"), s.completion("b")
    assert first.trajectory == second.trajectory
    events = read(first.trajectory)
    assert [e.session_turn for e in events if e.type == "run_start"] == [0, 1]
    assert [e.name for e in events if e.type == "context"] == ["context", "context_1"]
    assert [e.type for e in events].count("run_end") == 2


def test_a_session_survives_a_failed_completion():
    script = [done("1"), LMError("down", kind="connection"), done("context_1 + context_2")]
    root = ScriptedLM(script)
    with rlm(root).session() as s:
        s.completion("a")
        with pytest.raises(LMError):
            s.completion("b")
        assert s.completion("c").answer == "bc"


def test_a_session_survives_a_cancelled_completion():
    cancel = threading.Event()

    def stop():
        cancel.set()

    root = ScriptedLM([cell("x = 1"), cell("stop()\nwhile True: pass"), done("x + 1")])
    with rlm(root, tools=[stop]).session() as s:
        assert s.completion("a", cancel=cancel).stop_reason == "cancelled"
        assert s.completion("b").answer == 2


def test_a_closed_session_says_so():
    with rlm([done("1")]).session() as s:
        pass
    with pytest.raises(UsageError, match="session"):
        s.completion("a")

    async def main():
        async with rlm([done("1")]).session() as s:
            pass
        with pytest.raises(UsageError, match="closed"):
            await s.acompletion("a")

    asyncio.run(main())


def test_a_session_without_completions_starts_nothing():
    with rlm([]).session():
        pass
    assert not FakeEnvironment.live


def test_no_threads_are_left():
    before = threading.active_count()
    for _ in range(3):
        with rlm([done("1")]).session() as s:
            s.completion("a")
    assert threading.active_count() <= before


def test_compaction_in_a_session_keeps_the_current_task():
    def lead(messages):
        text = messages[-1].content
        if "about to be replaced by a summary" in text:
            return "summary"
        if "Next question: now?" in text:
            return done("any('before?' in m['content'] for m in history)")
        return done("1") if "Turn 12" in text else cell(f"print('y' * {400 + len(messages)})")

    root = ScriptedLM(lead, window=1900)
    with rlm(root, system_prompt="Work.").session() as s:
        first = s.completion("a", "before?")
        second = s.completion("b" * 10, "now? " * 200)
    assert "compacted" not in types(first) and types(second).count("compacted") == 1
    assert second.answer is True
    assert [m.role for m in root.messages[-1]] == ["system", "user", "assistant", "user"]
    assert "before?" in root.messages[-1][1].content and "now?" in root.messages[-1][-1].content
