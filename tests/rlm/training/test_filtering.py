"""Recorded runs as samples: counts at each step, what a turn was really asked, one form to finish
in."""

import json

import pytest

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import cell, done, echo
from rlm_runtime import RLM
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.training import filter_runs
from rlm_runtime.training.filtering import repair


def record(folder, *script, **options):
    lm = ScriptedLM(script, name="root", window=options.pop("window", None), tokens=len)
    options.setdefault("environment", FakeEnvironment)
    result = RLM(lm, echo(), log_dir=folder, **options).completion("some text", "What?")
    return lm, result


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_counts_at_each_step(tmp_path):
    runs = tmp_path / "runs"
    # one repaired
    record(runs, cell("total = 5\nprint(total)"), "FINAL_VAR(total)", environment="local")
    # one unusable
    record(runs, cell("print(1)"), "Let me think.", cell("y = llm_query('q')"), done("y"))
    record(runs, done("1"))  # one turn
    # its later turns are too long
    record(runs, cell("print('z' * 5000)"), cell("print(2)"), done("2"))
    _, bad = record(runs, cell("print(1)"), done("'wrong'"))
    (runs / "broken").mkdir()
    (runs / "broken" / "events.jsonl").write_text("{nonsense\n")
    _, cut = record(runs, cell("print(1)"), done("1"))
    events = cut.trajectory / "events.jsonl"
    events.write_text(
        "".join(line for line in events.read_text().splitlines(True) if '"run_end"' not in line)
    )
    row = {
        "task": "t",
        "length": 1,
        "mode": "rlm",
        "index": 0,
        "seed": 1,
        "model": "m",
        "score": 0.0,
        "trajectory": str(bad.trajectory),
    }
    (runs / "results.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "out.jsonl"
    sizes = [sum(len(m["content"]) for m in r["messages"]) for r in read_all(runs, tmp_path)]
    limit = sorted(sizes)[-3]  # the two longest are those of the long run
    report = filter_runs([runs], out, limit=limit, subs=True)
    assert report.counts == {
        "runs": 7,
        "unreadable": 1,
        "unfinished": 1,
        "score 0": 1,
        "one turn": 1,
        "runs kept": 3,
        "turns": 9,
        "unusable": 1,
        "repaired": 1,
        "too long": 2,
        "sub-calls": 1,
        "samples": 7,
    }
    samples = read(out)
    assert len(samples) == 7 and any("broken" in w for w in report.warnings)
    roots = [s for s in samples if s["provenance"]["role"] == "root"]
    for sample in roots:
        *before, last = sample["messages"]
        assert last["role"] == "assistant" and "weight" not in last and "```repl" in last["content"]
        assert all(m["weight"] == 0 for m in before if m["role"] == "assistant")
    (repaired,) = (s for s in roots if s["provenance"]["repaired"])
    assert (
        repaired["messages"][-1]["content"]
        == '```repl\nanswer["content"] = total\nanswer["ready"] = True\n```'
    )
    (sub,) = (s for s in samples if s["provenance"]["role"] == "sub")
    assert [m["content"] for m in sub["messages"]] == ["q", "Q"]


def read_all(runs, tmp_path):
    filter_runs([runs], tmp_path / "all.jsonl")
    return read(tmp_path / "all.jsonl")


@pytest.mark.parametrize("window", [None, 1700])
def test_a_sample_is_what_the_model_was_sent(tmp_path, window):
    script = [cell(f"print('{i}' * 400)") for i in range(6)] + [done("1")]
    lm, result = record(tmp_path / "runs", *script, window=window, prompt_variant="native")
    filter_runs([result.trajectory], tmp_path / "out.jsonl")
    asked = [[(m.role, m.content) for m in messages] for messages in lm.messages]
    got = [
        [(m["role"], m["content"]) for m in r["messages"][:-1]]
        for r in read(tmp_path / "out.jsonl")
    ]
    assert got == asked
    assert (window is None) == (len(asked[-1]) == 2 + 2 * 6)


def test_a_compacted_history_is_what_follows_it(tmp_path):
    script = [cell(f"print('{i}' * 400)") for i in range(2)] + ["A summary.", done("1")]
    lm, result = record(
        tmp_path / "runs", *script, window=13_000, compact_at=0.73, system_prompt="S" * 8400
    )
    assert any(e.type == "compacted" for e in result.events)
    filter_runs([result.trajectory], tmp_path / "out.jsonl")
    asked = [
        [m.content for m in messages]
        for messages in lm.messages
        if "1. What the context" not in messages[-1].content
    ]
    assert [
        [m["content"] for m in r["messages"][:-1]] for r in read(tmp_path / "out.jsonl")
    ] == asked


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        (cell("print(1)"), None),
        ("FINAL(42)", 'answer["content"] = '),
        (
            "So it is.\n```repl\nz = 3\nFINAL_VAR('z')\n```",
            'z = 3\nanswer["content"] = z\nanswer["ready"] = True',
        ),
        (
            "```python\nFINAL(max(1, 2))\n```",
            'answer["content"] = max(1, 2)\nanswer["ready"] = True',
        ),
        ("Found.\nFINAL_VAR(total)", 'answer["content"] = total\nanswer["ready"] = True'),
    ],
)
def test_repair_writes_one_form(reply, wanted):
    text, changed = repair(reply)
    assert changed == (wanted is not None)
    assert (text == reply) if wanted is None else (wanted in text and "FINAL" not in text)
    assert repair(text) == (text, False)  # once is enough


def test_a_reply_with_neither_code_nor_answer_is_no_sample():
    assert repair("I would look at the text first.") == (None, False)


def test_bad_input_is_one_clear_message(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(
        UsageError, match=r"No run at .*nowhere: expected a run folder with events.jsonl"
    ):
        filter_runs([tmp_path / "nowhere"], out)
    record(tmp_path / "runs", done("1"))
    out.write_text("kept")
    with pytest.raises(UsageError, match=r"nothing is left to write. 1 runs: .* 1 of one turn"):
        filter_runs([tmp_path / "runs"], out)
    assert out.read_text() == "kept"
    with pytest.raises(UsageError, match=r"No scores at .*eval"):
        filter_runs([tmp_path / "runs"], out, scores=tmp_path / "eval")
