"""The loop over real, sandboxed workers."""

import asyncio
import os
import random
import threading
from pathlib import Path

import pytest
from pydantic import BaseModel

from rlm.loop_helpers import CountingLM, ScriptedLM, cell, done, echo, told, types
from rlm_runtime import RLM, Limits
from rlm_runtime.trajectory import read

QUICK = Limits(cell_seconds=1.0, grace_seconds=0.5)


def rlm(script, sub=None, **options):
    root = script if hasattr(script, "complete") else ScriptedLM(script, name="root")
    return RLM(root, sub or echo(), **options)


def descendants():
    """Processes below this one, by their parents in /proc."""
    below, known = [], {os.getpid()}
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            if stat.rpartition(")")[2].split()[0] != "Z":
                parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    for _ in range(4):
        found = {pid for pid, parent in parents.items() if parent in known} - known
        below += found
        known |= found
    return set(below)


@pytest.fixture(autouse=True)
def nothing_is_left():
    before, files = descendants(), len(os.listdir("/proc/self/fd"))
    yield
    assert descendants() <= before
    assert len(os.listdir("/proc/self/fd")) <= files + 1


def test_a_file_over_many_turns(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(
        "".join(f"line {i}: nothing here\n" for i in range(20_000)) + "the magic number is 4711\n"
    )
    script = [
        cell("import re\nprint(len(context), context[:20])"),
        cell(
            "found = re.search(r'magic number is (\\d+)', str(context[-100:])).group(1)\nprint(found)"
        ),
        done("llm_query('say ' + found)"),
    ]
    root = ScriptedLM(script)
    result = rlm(root).completion(book, "What is the magic number?")
    assert (result.answer, result.stop_reason) == ("SAY 4711", "answered")
    assert "4711" in told(root) and "nothing here" not in told(root)
    assert result.sandbox.environment == "local" and not result.sandbox.missing


def test_hidden_output_is_announced_and_kept():
    script = [
        cell("print('a' * 50_000 + 'THE MIDDLE' + 'b' * 50_000)"),
        done("outputs[-1].count('THE MIDDLE')"),
    ]
    root = ScriptedLM(script)
    result = rlm(root).completion("text")
    assert result.answer == 1
    report = told(root)
    assert "THE MIDDLE" not in report and "outputs" in report and len(report) < 25_000


def test_three_levels_of_workers():
    def lead(messages):
        task = messages[1].content if len(messages) > 1 else ""
        if "level one" in task:
            return done("'1(' + rlm_query(context + '!', 'level two') + ')'")
        if "level two" in task:
            return done("'2(' + llm_query(context) + ')'")
        return messages[-1].content.upper()

    code = "out = rlm_batch(['a', 'b', 'c'], 'level one')"
    result = rlm([cell(code), done("out")], ScriptedLM(lead), max_depth=3).completion("text")
    assert result.answer == ["1(2(A!))", "1(2(B!))", "1(2(C!))"]
    assert set(result.usage_by_depth) == {0, 1, 2, 3}


def test_tools_of_three_kinds():
    def area(w: int, h: int) -> int:
        return w * h

    async def price(n: float) -> float:
        return n * 2

    code = "try:\n    area('wide', 2)\nexcept CallError as e:\n    kind = e.kind\nout = [area(4, h=FIELD['h']), price(1.5), kind]"
    tools = {"area": area, "price": price, "FIELD": {"h": 3}}
    assert rlm([cell(code), done("out")], tools=tools).completion("text").answer == [
        12,
        3.0,
        "tool",
    ]


class Place(BaseModel):
    town: str
    people: int


def test_structured_answers():
    root = ScriptedLM(
        [
            done("{'town': 'X'}"),
            done("[{'town': 'X', 'people': 5}]"),
            done("{'town': 'X', 'people': 5}"),
        ]
    )
    assert rlm(root).completion("text", output=Place).answer == Place(town="X", people=5)
    assert "people" in told(root, 1)


def test_a_batch_with_failures_in_place():
    sub = CountingLM(latency=0.001)
    code = "rs = llm_batch([f'a {i}' for i in range(250)])\nbad = [r for r in rs if isinstance(r, CallError)]\nkinds = {r.kind for r in bad}"
    model = rlm(
        [cell(code), done("[len(rs), len(bad), sorted(kinds)]")], sub, budget={"sub_calls": 100}
    )
    assert model.completion("text").answer == [250, 150, ["budget"]]
    assert (sub.calls, sub.most) == (100, 64)


def test_a_crash_is_told_and_survived():
    script = [
        cell("kept = 1"),
        cell("import os\nos._exit(3)"),
        cell("print(len(context))\nprint(kept)"),
        done("len(context)"),
    ]
    root = ScriptedLM(script)
    result = rlm(root).completion("x" * 77)
    assert result.answer == 77
    assert "Lost" in told(root, 2) and "NameError" in told(root, 3)


def test_an_endless_loop_is_stopped_and_the_run_goes_on():
    root = ScriptedLM([cell("while True: pass"), cell("print('still', len(context))"), done("5")])
    result = rlm(root, limits=QUICK).completion("text")
    assert result.answer == 5
    assert "still 4" in told(root) and "interrupted" in told(root, 1)


def test_waiting_for_sub_calls_is_no_cell_time():
    code = "out = [len(llm_batch(['x'] * 3)) for _ in range(4)]"
    result = rlm([cell(code), done("out")], echo(latency=0.4), limits=QUICK).completion("text")
    assert result.answer == [3, 3, 3, 3]


def test_a_session_keeps_its_contexts_over_a_restart():
    script = [
        cell("mine = context + '!'"),
        done("mine"),
        cell("import os\nos._exit(1)"),
        done("[context, context_1]"),
    ]
    root = ScriptedLM(script)
    with rlm(root).session() as s:
        assert s.completion("first").answer == "first!"
        assert s.completion("second").answer == ["first", "second"]


def test_compaction_puts_the_history_into_the_repl():
    def lead(messages):
        if "about to be replaced by a summary" in messages[-1].content:
            return "summary"
        if "`history`" in messages[-1].content:
            return done(
                "[m['role'] for m in history][:3] + [sum('zzz' in m['content'] for m in history) > 3]"
            )
        return cell(f"print({len(messages)}, 'zzz' * 100)")

    root = ScriptedLM(lead, window=3000)
    result = rlm(root, system_prompt="Work.").completion("text")
    assert result.answer == ["system", "user", "assistant", True]
    assert types(result).count("compacted") == 1


@pytest.mark.parametrize("seed", range(5))
def test_cancelling_at_any_moment_leaves_no_process(seed, tmp_path):
    def lead(messages):
        return (
            "a"
            if len(messages) == 1
            else cell("answer['content'] = 'd'\nllm_batch(['x'] * 9)\nrlm_batch(['y'] * 2)")
        )

    async def main():
        model = ScriptedLM(lead, latency=0.002)
        run = RLM(model, max_depth=2, budget={"turns": 10_000}, log_dir=tmp_path).start("text")
        await asyncio.sleep(random.Random(seed).random() * 0.8)
        run.cancel()
        async with asyncio.timeout(30):
            return await run.result()

    result = asyncio.run(main())
    assert result.stop_reason == "cancelled" and result.partial
    events = read(result.trajectory)
    assert events[-1].type == "run_end"
    started = sorted(e.node for e in events if e.type == "node_start")
    assert started == sorted(e.node for e in events if e.type == "node_end")


def test_seconds_stop_a_cell_that_works():
    root = ScriptedLM([cell("answer['content'] = 'half'\nwhile True: pass"), "whole"])
    result = rlm(root, budget={"seconds": 1.5}).completion("text")
    assert (result.answer, result.stop_reason, result.partial) == ("whole", "budget:seconds", True)


def test_an_answer_finished_before_the_cancel_counts():
    event = threading.Event()
    code = "answer.update(content='all of it', ready=True)\nstop()\nwhile True: pass"
    result = rlm([cell(code)], tools={"stop": event.set}).completion("text", cancel=event)
    assert (result.answer, result.stop_reason, result.partial) == ("all of it", "answered", False)


def test_older_protocols_finish_too():
    assert rlm([cell("total = [1, 2]"), "FINAL_VAR(total)"]).completion("text").answer == [1, 2]
    assert rlm([cell("FINAL({'n': 3})")]).completion("text").answer == {"n": 3}
