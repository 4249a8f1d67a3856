"""The engine of `rlm eval`, with a root that solves S-NIAH by a regular expression."""

import asyncio
import csv
import io
import json
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import done
from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.tasks import TASKS, get
from rlm_runtime.tasks.evaluate import aevaluate, evaluate
from rlm_runtime.tasks.results import Row, append_row, interval, read_rows, size_name, summarize

SOLVE = (
    "import re\n"
    "key = {key!r}\n"
    "answer['content'] = re.search('for ' + re.escape(key) + r' is: (\\S+)\\.', context).group(1)\n"
    "answer['ready'] = True"
)


def solver(wrong=(), **options):
    """Alone, it reads its prompt; as a root, it writes the regular expression. Numbers of calls in
    `wrong` go wrong."""
    lock, counter = threading.Lock(), [0]

    def reply(messages):
        with lock:
            counter[0] += 1
            number = counter[0]
        text = "\n".join(m.content for m in messages)
        key = re.search(r"magic number for (\S+) mentioned", text)[1]
        if number in wrong:
            raise LMError("the endpoint is down", kind="connection")
        if len(messages) == 1:
            return re.search(rf"for {re.escape(key)} is: (\S+)\.", text)[1]
        return "Look.\n```repl\n" + SOLVE.format(key=key) + "\n```"

    options.setdefault("usd_per_token", 1e-6)
    options.setdefault("window", 20_000)
    return ScriptedLM(reply, name="solver", **options)


def run(out, root=None, **options):
    options = {
        "lengths": ["4k", "60k"],
        "samples": 3,
        "rlm": {"environment": FakeEnvironment},
        **options,
    }
    return evaluate("s_niah", root=root or solver(), out=out, **options)


def by(evaluation):
    return {(s.mode, s.length): s for s in evaluation.summaries}


def test_the_three_modes(tmp_path):
    seen = []
    evaluation = run(tmp_path / "out", on_row=seen.append)
    s = by(evaluation)
    assert [(x.mode, x.length) for x in evaluation.summaries] == [
        (m, n) for n in (4000, 60_000) for m in ("base", "repl", "rlm")
    ]
    assert s["base", 4000].score == s["repl", 60_000].score == s["rlm", 60_000].score == 1.0
    assert s["base", 60_000].score is None and s["base", 60_000].over_window == 3
    assert s["base", 4000].runs == 3 and s["base", 4000].low == pytest.approx(0.4385, abs=1e-3)
    assert s["base", 4000].input_tokens > 3500 > s["rlm", 60_000].input_tokens > 100
    assert s["rlm", 4000].cost_usd > 0 and s["rlm", 4000].calls == 1.0
    assert len(seen) == 18 and {r.status for r in seen} == {"ok", "over_window"}
    row = next(r for r in seen if r.mode == "rlm" and r.length == 60_000)
    assert row.reply == row.expected.strip('["]') and row.turns == 1 and row.context_bytes > 200_000
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]  # the contexts are gone
    for name in ("results.jsonl", "summary.json", "summary.csv", "s_niah.png"):
        assert (
            tmp_path / "out" / name
        ).stat().st_size > 100 and tmp_path / "out" / name in evaluation.files
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())) == 6
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["over_window"] for r in rows if r["mode"] == "base"] == ["0", "3"]


def test_the_table_fits_a_terminal(tmp_path):
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(run(tmp_path, solver(wrong={1}), concurrency=1).table())
    lines = console.export_text().splitlines()
    text = "\n".join(lines)
    assert (
        "over window" in text
        and "1.000" in text
        and "0.44-1.00" in text
        and "60k" in text
        and "\u2026" not in text
    )
    assert "base at 4k: 1 failed" in text and "s_niah" in lines[0]


def test_it_goes_on_where_it_stopped(tmp_path):
    first = solver()
    run(tmp_path, first, lengths="4k", modes=["repl", "rlm"], samples=2)
    assert first.count == 4
    again = solver()
    evaluation = run(tmp_path, again, lengths="4k", modes=["repl", "rlm"], samples=3)
    assert again.count == 2 and len(evaluation.rows) == 6
    other = solver()
    run(
        tmp_path,
        other,
        lengths="4k",
        modes=["rlm"],
        samples=3,
        rlm={"environment": FakeEnvironment, "max_depth": 2},
    )
    assert other.count == 3  # other settings are other runs
    seeded = solver()
    run(tmp_path, seeded, lengths="4k", modes=["rlm"], samples=3, seed=7)
    assert seeded.count == 3
    none = solver()
    assert (
        len(run(tmp_path, none, lengths="4k", modes=["repl", "rlm"], samples=3).rows) == 6
        and none.count == 0
    )


def test_a_failed_run_is_a_row_and_is_tried_again(tmp_path):
    flaky = solver(wrong={2, 3})
    evaluation = run(tmp_path, flaky, lengths="4k", modes=["base"], samples=4, concurrency=1)
    assert [r.status for r in evaluation.rows] == ["ok", "error", "error", "ok"]
    assert "endpoint is down" in evaluation.rows[1].error
    assert evaluation.summaries[0].errors == 2 and evaluation.summaries[0].runs == 2
    again = solver()
    evaluation = run(tmp_path, again, lengths="4k", modes=["base"], samples=4)
    assert again.count == 2 and {r.status for r in evaluation.rows} == {"ok"}


@pytest.mark.parametrize("mode", ["base", "rlm"])
def test_a_wrong_key_ends_the_evaluation_at_once(tmp_path, mode):
    def refuse(messages):
        raise LMError("401: wrong key", kind="auth", model="solver")

    root = ScriptedLM(refuse, name="solver", window=10**6)
    with pytest.raises(LMError, match="wrong key"):
        run(tmp_path, root, lengths="4k", modes=[mode], samples=50, concurrency=2)
    assert root.count <= 4
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_an_overflow_the_endpoint_reports_is_over_the_window(tmp_path):
    root = ScriptedLM(lambda m: LMError("too long", kind="context_overflow"), name="small")
    evaluation = run(tmp_path, root, lengths="4k", modes=["base"], samples=2)
    assert [r.status for r in evaluation.rows] == ["over_window"] * 2


def test_runs_overlap_as_far_as_allowed_and_modes_share_a_context(tmp_path):
    root = solver(latency=0.05)
    run(tmp_path, root, lengths="4k", samples=8, concurrency=6)
    assert root.max_concurrency == 6


def test_many_questions_about_one_window_write_it_once(tmp_path):
    root = ScriptedLM(lambda m: "Answer: 3" if len(m) == 1 else done("'Answer: 3'"), name="guesser")
    out = tmp_path / "out"
    evaluation = evaluate(
        ["oolong", "oolong_pairs"],
        "4k",
        ["base", "repl"],
        root=root,
        samples=27,
        out=out,
        keep_contexts=True,
        plot=False,
        rlm={"environment": FakeEnvironment},
        concurrency=8,
    )
    assert len(evaluation.rows) == 108 and {r.status for r in evaluation.rows} == {"ok"}
    assert len(list((out / "contexts").iterdir())) == 4
    scores = {s.score for s in evaluation.summaries if s.task == "oolong"}
    assert len(scores) == 1 and 0 < scores.pop() < 1


def test_cancelling_keeps_what_is_done(tmp_path):
    rows = []

    async def scenario():
        started = asyncio.Event()

        def seen(row):
            rows.append(row)
            started.set()

        work = asyncio.create_task(
            aevaluate(
                "s_niah",
                "4k",
                ["rlm"],
                root=solver(latency=0.02),
                samples=40,
                out=tmp_path,
                concurrency=2,
                on_row=seen,
                rlm={"environment": FakeEnvironment},
            )
        )
        await started.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(scenario())
    assert 1 <= len(rows) < 40 and not FakeEnvironment.live
    assert len(read_rows(tmp_path / "results.jsonl")) == len(rows)
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]
    left = solver()
    assert len(run(tmp_path, left, lengths="4k", modes=["rlm"], samples=40).rows) == 40
    assert left.count == 40 - len(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modes": ["bass"]}, "unknown mode 'bass'"),
        ({"lengths": ["8x"]}, "length '8x'"),
        ({"lengths": [20]}, "too short"),
        ({"samples": 0}, "at least 1"),
        ({"modes": ["rlm+tip"]}, "as in rlm+tips"),
        ({"rlm": {"tips": "x"}}, "no mode uses them"),
        ({"modes": []}, "at least one"),
        ({"rlm": {"max_depth": 0}}, "max_depth is at least 1"),
        ({"rlm": {"budget": {"dollars": 3}}}, "budget.dollars"),
        ({"root": "openia:x"}, "unknown model"),
        ({"sampling": {"heat": 1}}, "sampling.heat"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(tmp_path, options, words):
    root = options.pop("root", None) or solver()
    with pytest.raises(UsageError, match=re.escape(words)):
        run(tmp_path / "out", root, **options)
    assert not (tmp_path / "out" / "results.jsonl").exists()
    with pytest.raises(UsageError, match="unknown task"):
        evaluate("s_nia", root=solver(), out=tmp_path)


def test_modes_of_other_depths(tmp_path):
    evaluation = run(tmp_path, lengths="4k", modes=["rlm", "rlm3"], samples=1)
    assert len({r.settings for r in evaluation.rows}) == 2 and [
        r.mode for r in evaluation.rows
    ] == ["rlm", "rlm3"]


def test_tips_are_a_mode_of_their_own(tmp_path):
    root = solver()
    evaluation = run(
        tmp_path, root, lengths="4k", modes=["rlm", "rlm+tips", "repl+tips"], samples=1
    )
    assert {m for m, _ in by(evaluation)} == {"rlm", "rlm+tips", "repl+tips"}
    assert len({row.settings for row in evaluation.rows}) == 3
    tasks = ["\n".join(m.content for m in messages) for messages in root.messages]
    tipped = [text for text in tasks if get("s_niah").tips in text]
    assert len(tasks) == 3 and len(tipped) == 2
    again = solver()
    own = {"environment": FakeEnvironment, "tips": "Mine."}
    run(tmp_path, again, lengths="4k", modes=["rlm", "rlm+tips"], samples=1, rlm=own)
    # the user's tips are others than the task's; the mode without tips is the same run
    (asked,) = again.messages
    assert "Mine." in asked[1].content and get("s_niah").tips not in asked[1].content


@pytest.mark.parametrize("name", TASKS)
def test_every_task_carries_tips(name):
    assert len(get(name).tips) > 100


def test_progress_as_lines(tmp_path, capsys):
    run(tmp_path, lengths="4k", modes=["base"], samples=2, show=True)
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 2 and lines[0].startswith("[1/2] s_niah 4,000 base #") and "1.00" in lines[0]
    )


def test_a_real_repl_and_a_file_of_two_million_tokens(tmp_path):
    """8 MB: the worker's own process, and a text it reads lazily."""
    evaluation = evaluate(
        "s_niah",
        ["20k", "2.2M"],
        ["repl", "rlm"],
        root=solver(),
        samples=1,
        out=tmp_path,
        plot=False,
    )
    assert [r.score for r in evaluation.rows] == [1.0] * 4, [
        r.error or r.reply for r in evaluation.rows
    ]
    assert max(r.context_bytes for r in evaluation.rows) > 8 << 20


# -- rows and statistics


def test_rows_survive_a_cut_line(tmp_path):
    path = tmp_path / "r.jsonl"
    row = Row(
        task="t", length=1, mode="base", index=0, seed=1, model="m", score=1.0, reply="\ud800 odd"
    )
    append_row(path, row)
    with open(path, "ab") as file:
        file.write(b'{"task": "t", "leng')
    append_row(path, row.model_copy(update={"index": 1}))
    append_row(path, row.model_copy(update={"score": 0.5}))
    rows = read_rows(path)
    assert {k[3]: r.score for k, r in rows.items()} == {0: 0.5, 1: 1.0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_interval_holds_the_mean(scores):
    low, high = interval(scores)
    assert (
        0 <= low <= sum(scores) / len(scores) + 1e-9
        and sum(scores) / len(scores) - 1e-9 <= high <= 1
    )
    assert (low, high) == interval(scores)


def test_wilson_against_published_values():
    low, high = interval([1.0] * 8 + [0.0] * 2)  # 8 of 10: 0.4902 to 0.9433
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert interval([0.0] * 5)[0] == 0.0 < interval([0.0] * 5)[1] and interval([]) == (None, None)
    narrow, wide = interval([0.5, 0.6] * 50), interval([0.0, 0.9] * 50)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


def test_means_leave_out_what_was_not_asked():
    rows = [
        Row(
            task="t",
            length=8,
            mode="base",
            index=i,
            seed=1,
            model="m",
            score=s,
            status=k,
            cost_usd=c,
            calls=1,
        )
        for i, (s, k, c) in enumerate(
            [(1.0, "ok", 2.0), (0.0, "ok", 4.0), (None, "over_window", None), (None, "error", None)]
        )
    ]
    summary = summarize(rows)[0]
    assert (summary.runs, summary.score, summary.cost_usd, summary.over_window, summary.errors) == (
        2,
        0.5,
        3.0,
        1,
        1,
    )


def test_names_of_sizes():
    assert [size_name(n) for n in (500, 8000, 8192, 1500, 128_000, 10**6, 2_200_000)] == [
        "500",
        "8k",
        "8192",
        "1.5k",
        "128k",
        "1M",
        "2.2M",
    ]


def test_a_figure_with_unknown_costs(tmp_path):
    evaluation = run(
        tmp_path, solver(usd_per_token=None, window=None), lengths=["4k", "8k"], samples=2
    )
    assert (
        evaluation.summaries[0].cost_usd is None and (tmp_path / "s_niah.png").stat().st_size > 5000
    )
    assert get("s_niah").about
