"""What an evaluation measured: one row a run, kept as it happens; summaries with confidence
intervals."""

from __future__ import annotations

import csv
import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from rlm_runtime.lms.base import Frozen

Key = tuple[str, int, str, int, int, str, str]  # see `Row.key`
RESAMPLES = 2000
Z = 1.959964  # 95 %


class Row(Frozen):
    """One run. `status`: ok | over_window (the prompt does not fit the model: not asked) | error
    (tried again on resume)."""

    task: str
    length: int
    mode: str
    index: int
    seed: int
    model: str
    settings: str = ""  # a short hash of the run's settings: rows of other settings are other rows
    status: str = "ok"
    score: float | None = None
    error: str | None = None
    stop_reason: str = ""
    seconds: float = 0.0
    cost_usd: float | None = None
    calls: int = 0
    sub_calls: int = 0
    turns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    context_bytes: int = 0
    question: str = ""
    expected: str = ""
    reply: str = ""
    trajectory: str | None = None
    finished_at: str = ""

    @property
    def key(self) -> Key:
        return self.task, self.length, self.mode, self.index, self.seed, self.model, self.settings


def read_rows(path: Path) -> dict[Key, Row]:
    """The last row of each run. Lines cut off by a crash are left out."""
    rows: dict[Key, Row] = {}
    if not path.exists():
        return rows
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = Row.model_validate_json(line)
            except ValidationError:
                continue
            rows[row.key] = row
    return rows


def append_row(path: Path, row: Row) -> None:
    append_line(path, json.dumps(row.model_dump(), ensure_ascii=False))


def append_line(path: Path, line: str) -> None:
    """One write for one line; a line that a crash cut off before is closed first."""
    data = (line + "\n").encode("utf-8", "replace")  # a reply may hold surrogates
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


class TaskSummary(Frozen):
    """The runs of one task, mode and length. `score`: mean, with a 95 % interval; None where
    nothing could be asked."""

    task: str
    mode: str
    length: int
    runs: int
    score: float | None
    low: float | None
    high: float | None
    over_window: int = 0
    errors: int = 0
    failures: dict[str, int] = Field(default_factory=dict)  # runs without full score, by `failure`
    cost_usd: float | None = None  # means of a run
    calls: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    seconds: float = 0.0


def summarize(rows: Iterable[Row]) -> list[TaskSummary]:
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.task, row.mode, row.length), []).append(row)
    return [_summary(*key, group) for key, group in groups.items()]


def _summary(task: str, mode: str, length: int, rows: Sequence[Row]) -> TaskSummary:
    scored = [r for r in rows if r.score is not None]
    scores = [r.score for r in rows if r.score is not None]
    low, high = interval(scores)
    costs = [r.cost_usd for r in scored]
    return TaskSummary(
        task=task,
        mode=mode,
        length=length,
        runs=len(scored),
        score=_mean(scores),
        low=low,
        high=high,
        over_window=sum(r.status == "over_window" for r in rows),
        errors=sum(r.status == "error" for r in rows),
        failures=dict(Counter(sorted(filter(None, map(failure, rows))))),
        cost_usd=None if not costs or None in costs else _mean(costs),
        calls=_mean([r.calls for r in scored]) or 0.0,
        input_tokens=_mean([r.input_tokens for r in scored]) or 0.0,
        output_tokens=_mean([r.output_tokens for r in scored]) or 0.0,
        seconds=_mean([r.seconds for r in scored]) or 0.0,
    )


def failure(row: Row) -> str:
    """The class of a run that did not score 1, or "": what stopped it, or how its answer was."""
    if row.score is None or row.score >= 1:
        return ""
    if row.stop_reason not in ("answered", "stop", ""):
        return f"stopped by {row.stop_reason}"
    declined = row.reply.strip().lower()
    if declined in ("not found", "not in my competence"):
        return declined
    return "partly right" if row.score > 0 else "wrong"


def interval(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """95 %: Wilson's where every score is 0 or 1, else the bootstrap's; one graded score says
    nothing about the mean."""
    n = len(scores)
    if not n:
        return None, None
    if all(s in (0.0, 1.0) for s in scores):
        p, z2 = sum(scores) / n, Z * Z
        middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))
    if n == 1:
        return 0.0, 1.0
    rng = random.Random(0)
    means = sorted(math.fsum(rng.choices(scores, k=n)) / n for _ in range(RESAMPLES))
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def _mean(values: Sequence[Any]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def write_summaries(out: Path, summaries: Sequence[TaskSummary]) -> None:
    """summary.json and summary.csv."""
    dumped = [s.model_dump() for s in summaries]
    (out / "summary.json").write_text(json.dumps(dumped, indent=1) + "\n", encoding="utf-8")
    flat = [d | {"failures": json.dumps(d["failures"])} for d in dumped]
    with open(out / "summary.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(TaskSummary.model_fields))
        writer.writeheader()
        writer.writerows(flat)


def size_name(length: int) -> str:
    """8192 -> 8192, 128000 -> 128k, 10000000 -> 10M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if length >= unit and length % (unit // 1000 * 100 or 1) == 0:
            return f"{length / unit:g}{name}"
    return str(length)


def table(summaries: Sequence[TaskSummary]) -> Any:
    """A rich table for each task, narrow enough for a terminal of 80 columns."""
    from rich.console import Group

    tasks = dict.fromkeys(s.task for s in summaries)
    return Group(*(_table(task, [s for s in summaries if s.task == task]) for task in tasks))


def _table(task: str, summaries: Sequence[TaskSummary]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=Text(f"{task}: score with its 95 % interval, and means of a run"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("length", no_wrap=True)
    shown.add_column("mode", no_wrap=True)
    for name in ("runs", "score", "interval", "cost", "calls", "in", "out", "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    before = None
    for s in summaries:
        score, bounds = _score(s)
        tokens = [_short(s.input_tokens), _short(s.output_tokens)]
        cost = "-" if s.cost_usd is None else f"${s.cost_usd:.4f}"
        means = [cost, f"{s.calls:.1f}", *tokens, f"{s.seconds:.2f}"] if s.runs else ["-"] * 5
        shown.add_row(
            "" if s.length == before else size_name(s.length),
            s.mode,
            str(s.runs),
            score,
            bounds,
            *means,
        )
        before = s.length
    notes = [f"{s.mode} at {size_name(s.length)}: {s.errors} failed" for s in summaries if s.errors]
    notes += [
        f"{s.mode} at {size_name(s.length)}: {s.over_window} over the window"
        for s in summaries
        if s.over_window and s.runs
    ]
    notes += [
        f"{s.mode} at {size_name(s.length)}: "
        + ", ".join(f"{n} {what}" for what, n in s.failures.items())
        for s in summaries
        if s.failures
    ]
    if notes:
        shown.caption, shown.caption_justify = Text("; ".join(notes)), "left"
    return shown


def _score(s: TaskSummary) -> tuple[str, str]:
    if s.score is None:
        return "-", "over window" if s.over_window else "-"
    return f"{s.score:.3f}", f"{s.low:.2f}-{s.high:.2f}"


def _short(tokens: float) -> str:
    """1234567 -> 1.23M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= 0.9995 * unit:
            return f"{tokens / unit:.3g}{name}"
    return f"{tokens:.0f}"
