"""Replaying a run gives what was recorded, and tells where it does not."""

import json

import pytest

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import cell, done, rlm
from rlm_runtime.cli import main
from rlm_runtime.errors import ContextError, UsageError
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.repl.base import Limits
from rlm_runtime.replay import replay
from rlm_runtime.trajectory import (
    EVENTS,
    CellEnd,
    CellStart,
    NodeEnd,
    NodeStart,
    SandboxUp,
    TrajectoryWriter,
    encode,
    read,
)

TEXT = "The magic number for quiet-otter is: 7481234.\n" * 50


def recorded(tmp_path, script, context=TEXT, question="Which?", **options):
    result = rlm(script, log_dir=tmp_path / "logs", **options).completion(context, question)
    return result.trajectory


def again(folder, **options):
    return replay(folder, environment=options.pop("environment", FakeEnvironment), **options)


def rewrite(folder, change):
    """Change the recorded events: `change(event)` returns the event to keep, or None."""
    events = [change(e) for e in read(folder)]
    (folder / EVENTS).write_bytes(b"".join(encode(e) + b"\n" for e in events if e is not None))


def test_a_run_with_everything_replays_the_same(tmp_path):
    def tool(x: int) -> int:
        """Twice x."""
        return 2 * x

    script = [
        cell("print(len(context), tool(4), limit)"),
        cell(
            "a = llm_batch([f'piece {i}' for i in range(9)])\nprint(a)\nprint(llm_query('piece 1'), llm_query({'k': 1}))"
        ),
        cell("1/0"),
        "I only think here.",
        cell("print(rlm_query('small text', 'why?'))"),
        cell("print('x' * 30000)"),
        done("[len(a), 'é\\u2028']"),
    ]
    child = [cell("print(context)\nb = llm_query('inner ' + context)"), done("b")]
    steps = iter(child)

    def below(messages):  # leads the child RLM, and answers plain calls
        return next(steps) if messages[0].role == "system" else messages[-1].content.upper()

    lm = ScriptedLM(below, name="below")
    folder = recorded(tmp_path, script, sub=lm, tools={"tool": tool, "limit": 11}, max_depth=2)
    seen = []
    report = again(folder, on_cell=lambda start, same: seen.append((start.node, same)))
    assert report.ok, [d.line() for d in report.differences]
    events = read(folder)
    assert report.cells == sum(isinstance(e, CellEnd) for e in events) == len(seen) == 8
    assert report.calls == sum(isinstance(e, NodeStart) for e in events) == 14
    assert report.nodes == 2 and all(same for _, same in seen) and not report.warnings
    assert "all the same" in report.line()
    outer = again(folder, children=False)
    assert outer.ok and outer.nodes == 1 and outer.cells == 6


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("stdout", {"stdout": "something else\n"}),
        ("stderr", {"stderr": "oops"}),
        ("status", {"status": "timeout"}),
        ("answer", {"answer": {"content": "other", "ready": False}}),
        ("error", {"error": {"type": "ValueError", "message": "x", "traceback": ""}}),
        ("variables", {"variables": {"x": "int"}}),
    ],
)
def test_every_field_of_a_result_is_compared(tmp_path, field, change):
    folder = recorded(tmp_path, [cell("print('hello')"), done("1")])
    changed = []

    def tamper(event):
        if isinstance(event, CellEnd) and not changed:
            changed.append(event)
            raw = {**event.model_dump(), "result": {**event.result.model_dump(), **change}}
            return CellEnd.model_validate(raw)
        return event

    rewrite(folder, tamper)
    report = again(folder)
    assert [d.field for d in report.differences] == [field]
    found = report.differences[0]
    assert (found.node, found.turn, found.cell) == ("0", 1, 1) and field in found.line()


def test_the_recorded_outcomes_are_what_the_cells_get(tmp_path):
    folder = recorded(tmp_path, [cell("print(llm_query('a'))"), done("1")])
    rewrite(
        folder, lambda e: e.model_copy(update={"value": "changed"}) if isinstance(e, NodeEnd) else e
    )
    report = again(folder)
    assert [(d.field, d.recorded, d.replayed) for d in report.differences] == [
        ("stdout", "A\n", "changed\n")
    ]


def test_calls_that_come_in_another_order_find_their_outcome(tmp_path):
    folder = recorded(tmp_path, [cell("print(llm_batch(['a', 'b', 'a', 'c']))"), done("1")])
    events = list(read(folder))
    calls = [i for i, e in enumerate(events) if isinstance(e, NodeStart)]
    events[calls[0]], events[calls[-1]] = events[calls[-1]], events[calls[0]]
    (folder / EVENTS).write_bytes(b"".join(encode(e) + b"\n" for e in events))
    assert again(folder).ok


def test_calls_missing_and_calls_unknown_are_told(tmp_path):
    folder = recorded(tmp_path, [cell("print(llm_batch(['a', 'b']))"), done("1")])
    rewrite(
        folder,
        lambda e: (
            e.model_copy(update={"prompt": "z"})
            if isinstance(e, NodeStart) and e.prompt == "b"
            else e
        ),
    )
    report = again(folder)
    calls = [(d.recorded, d.replayed) for d in report.differences if d.field == "calls"]
    assert calls == [("0.2: z", "(not made)"), ("(not made)", "b")]


def test_a_failed_call_fails_again(tmp_path):
    code = "try:\n    llm_query('x', model='nobody')\nexcept Exception as e:\n    print(type(e).__name__, e.kind, e)"
    folder = recorded(tmp_path, [cell(code), done("1")])
    events = read(folder)
    assert any(isinstance(e, NodeEnd) and e.kind == "refused" for e in events)
    assert again(folder).ok


def test_nature_is_told_apart_from_change(tmp_path):
    code = "import time\nprint('took', time.perf_counter_ns(), 's')"
    folder = recorded(tmp_path, [cell("print(object())"), cell(code), done("1")])
    other = rewrite_addresses(folder)
    report = again(folder)
    assert {d.cause for d in report.differences} == {"addresses", "numbers"} and other
    without = again(folder, ignore=("addresses",))
    assert {d.cause for d in without.differences} == {"numbers"} and without.ignored == 1
    assert again(folder, ignore=("addresses", "numbers")).ok


def rewrite_addresses(folder):
    """Make sure that the first cell's address differs: an allocator may give the same one twice."""
    done = []

    def change(event):
        if isinstance(event, CellEnd) and "0x" in event.result.stdout and not done:
            done.append(1)
            head = event.result.stdout.split("0x")[0]
            result = event.result.model_copy(update={"stdout": head + "0x7f0000001234>\n"})
            return event.model_copy(update={"result": result})
        return event

    rewrite(folder, change)
    return done


def test_a_reply_that_does_not_give_its_cells_is_told(tmp_path):
    folder = recorded(tmp_path, [cell("x = 1"), done("1")])
    rewrite(
        folder,
        lambda e: (
            e.model_copy(update={"code": "x = 2"})
            if isinstance(e, CellStart) and e.turn == 1
            else e
        ),
    )
    report = again(folder)
    found = [d for d in report.differences if d.field == "cells"]
    assert [(d.turn, d.recorded, d.replayed) for d in found] == [(1, "x = 2", "x = 1")]


def test_an_answer_that_was_refused_is_taken_back(tmp_path):
    script = [done("'no number'"), cell("print(answer)"), done("12")]
    folder = (
        rlm(script, log_dir=tmp_path / "logs")
        .completion(TEXT, "How many?", output={"type": "integer"})
        .trajectory
    )
    report = again(folder)
    assert report.ok and report.cells == 3, [d.line() for d in report.differences]


def test_cells_of_a_last_call_ask_in_vain_again(tmp_path):
    code = "try:\n    print(llm_query('more'))\nexcept Exception as e:\n    print('refused', e)\nFINAL('best')"
    result = rlm(
        [cell("x = 1"), cell(code)], budget={"turns": 1}, log_dir=tmp_path / "logs"
    ).completion(TEXT, "q")
    assert result.answer == "best" and result.partial
    report = again(result.trajectory)
    assert report.ok and report.cells == 2, [d.line() for d in report.differences]


def test_history_after_compaction_is_bound_again(tmp_path):
    steps = iter(
        [cell(f"x = 'long ' * {400 + i}\nprint(x)") for i in range(6)]
        + [cell("print(len(history), [m['role'] for m in history])"), done("1")]
    )

    def reply(messages):
        if "ummar" in messages[-1].content:
            return "summary of what was done"
        return next(steps)

    lm = ScriptedLM(reply, name="root", window=3000)
    result = rlm(lm, log_dir=tmp_path / "logs", compact_at=0.6).completion(TEXT, "q")
    assert "compacted" in [e.type for e in read(result.trajectory)]
    shown = [
        e.result.stdout
        for e in read(result.trajectory)
        if isinstance(e, CellEnd) and "assistant" in e.result.stdout
    ]
    assert shown
    report = again(result.trajectory)
    assert report.ok, [d.line() for d in report.differences]


def test_a_session_replays_in_one_repl(tmp_path):
    steps = iter(
        [
            cell("kept = len(context)\nprint(llm_query('a'))"),
            done("kept"),
            cell("print(kept, len(context_1), llm_query('b'))"),
            done("kept"),
        ]
    )
    one = rlm(ScriptedLM(lambda m: next(steps), name="root"), log_dir=tmp_path / "logs")
    with one.session() as session:
        first = session.completion(TEXT, "one?")
        second = session.completion("another text", "two?")
    assert first.trajectory == second.trajectory
    report = again(first.trajectory)
    assert report.ok and report.cells == 4 and report.calls == 2, [
        d.line() for d in report.differences
    ]


def test_a_context_file_may_have_moved_but_not_changed(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    folder = recorded(tmp_path, [cell("print(len(context))"), done("1")], context=file)
    assert again(folder).ok
    moved = file.rename(tmp_path / "moved.txt")
    with pytest.raises(ContextError):
        again(folder)
    assert again(folder, context=moved).ok
    moved.write_text(TEXT.replace("7", "8"))
    with pytest.raises(ContextError, match="hash"):
        again(folder, context=moved)


def test_a_changed_blob_is_refused(tmp_path):
    folder = recorded(tmp_path, [cell("print(len(context))"), done("1")])
    (blob,) = (folder / "blobs").iterdir()
    blob.write_bytes(b"tampered")
    with pytest.raises(ContextError, match="hash"):
        again(folder)


def test_a_run_that_was_killed_replays_as_far_as_it_goes(tmp_path):
    folder = recorded(tmp_path, [cell("print(1)"), cell("print(2)"), done("1")])
    lines = (folder / EVENTS).read_bytes().split(b"\n")
    last = max(
        i for i, line in enumerate(lines) if json.loads(line or b"{}").get("type") == "cell_start"
    )
    (folder / EVENTS).write_bytes(b"\n".join(lines[: last + 1]) + b"\n" + lines[last + 1][:30])
    report = again(folder)
    assert report.ok and report.cells == 2 and len(report.warnings) == 2


def test_nothing_to_replay_is_said(tmp_path):
    with pytest.raises(UsageError, match="No trajectory"):
        replay(tmp_path)
    (tmp_path / EVENTS).write_text('{"type":"run_start","run":"r","started_at":"x"}\n')
    with pytest.raises(UsageError, match="nothing to replay"):
        replay(tmp_path)


def test_in_the_real_sandbox(tmp_path):
    """Crashes, timeouts, errors, tools, children: what the real worker did it does again."""

    def tool(x: int) -> int:
        """Twice x."""
        return 2 * x

    script = [
        cell(
            "import sys\nprint(tool(4), limit)\nprint('err', file=sys.stderr)\nkeep = {'a': [1] * 50}"
        ),
        cell("import os\nos._exit(3)"),
        cell("try:\n    print(keep)\nexcept NameError as e:\n    print(e)"),
        cell("while True: pass"),
        cell("def f():\n    return 1 / 0\nf()"),
        cell("for i in range(9000): print(i, 'line')"),
        cell("print(llm_batch(['a', {'j': 1}, 'b\\ud800']), len(context))"),
        cell(
            "print(rlm_batch(['small', 'tiny'], 'why?'))\nprint(object())\nimport random\nprint(random.random())"
        ),
        done("{'a': 1}"),
    ]

    def below(messages):
        leads = messages[0].role == "system"
        return (
            done("context + llm_query('in ' + context)") if leads else messages[-1].content.upper()
        )

    folder = recorded(
        tmp_path,
        script,
        sub=ScriptedLM(below, name="below"),
        tools={"tool": tool, "limit": 7},
        max_depth=2,
        environment="local",
        limits={"cell_seconds": 2, "grace_seconds": 0.5},
    )
    statuses = {e.result.status for e in read(folder) if isinstance(e, CellEnd)}
    assert statuses >= {"ok", "error", "crashed", "timeout"}
    report = replay(folder)
    assert report.nodes == 3 and report.cells == 11 and report.calls == 8
    assert {d.cause for d in report.differences} <= {"addresses", "numbers"}, [
        d.line() for d in report.differences
    ]
    assert any(d.cause == "numbers" and d.turn == 8 for d in report.differences)
    assert replay(folder, ignore=("addresses", "numbers")).ok


def test_a_record_may_lower_the_limits_of_a_replay_and_never_raise_them(tmp_path):
    folder = recorded(tmp_path, [cell("print(1)"), done("1")])
    wild = {
        "memory": 1 << 50,
        "scratch": 1 << 50,
        "cell_seconds": 1e9,
        "frame": -1,
        "requests": 0,
        "output_chars": 1000,
    }

    def change(event):
        if isinstance(event, SandboxUp):
            return event.model_copy(update={"limits": event.limits | wild})
        return event

    rewrite(folder, change)
    used = []

    def environment(limits):
        used.append(limits)
        return FakeEnvironment(limits)

    report = again(folder, environment=environment)
    assert used == [Limits(output_chars=1000)]
    for name in ("memory", "scratch", "cell_seconds", "frame", "requests"):
        assert sum(f"limit {name}=" in warning for warning in report.warnings) == 1
    mine = Limits(memory=1 << 51, cell_seconds=5.0)
    again(folder, environment=environment, limits=mine)
    assert used[1] == mine.model_copy(update={"output_chars": 1000, "memory": 1 << 50})


def test_the_command_line_raises_the_limits_of_a_replay_by_name(tmp_path, capsys):
    folder = recorded(tmp_path, [cell("print(1)"), done("1")], environment="local")
    assert main(["replay", str(folder), "--set", "memory=3000000000"]) == 0
    assert main(["replay", str(folder), "--set", "usd=1"]) == 2
    assert "usd" in capsys.readouterr().err


def test_a_record_whose_long_texts_were_cut_replays_the_same(tmp_path, monkeypatch):
    """Prompts are found by what is left of them, and results compared with what is left of
    theirs."""
    monkeypatch.setattr(
        TrajectoryWriter.__init__,
        "__kwdefaults__",
        {"append": False, "memory_bytes": 1, "disk_bytes": 400_000},
    )
    script = [
        cell("big = 'x' * 300_000\nprint(llm_query('count ' + big))\nanswer['content'] = big"),
        cell("print(llm_query('count' + big + 'y'), rlm_query('z' * 300_000, 'what?'))"),
        done("1"),
    ]
    lm = ScriptedLM(
        lambda messages: done("2") if messages[0].role == "system" else "many", name="below"
    )
    folder = recorded(tmp_path, script, sub=lm, max_depth=2)
    assert (folder / EVENTS).stat().st_size < 400_000
    assert any("not recorded" in e.prompt for e in read(folder) if isinstance(e, NodeStart))
    report = again(folder)
    assert report.ok and report.calls == 3, [d.line() for d in report.differences]
    assert any("too large to record" in warning for warning in report.warnings)
