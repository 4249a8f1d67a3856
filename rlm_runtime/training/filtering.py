"""Recorded runs of any model as training samples, after the recipe of RLM-Qwen3-8B (Zhang et al.
2025).

Runs with score 0 and runs of one turn are dropped; each turn that is left is one sample (the
conversation so far, then the reply); replies that finish in another form are rewritten to the
runtime's own; samples that are too long are dropped.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlm_runtime import parsing
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import Message, Reply
from rlm_runtime.tasks.base import writing
from rlm_runtime.tasks.results import read_rows
from rlm_runtime.training.samples import Conversation, spoken
from rlm_runtime.trajectory import (
    Asked,
    Compacted,
    NodeEnd,
    NodeStart,
    Replied,
    RunEnd,
    RunStart,
    read,
)
from rlm_runtime.trajectory.reader import EVENTS, Trajectory

LIMIT = 100_000  # characters of a sample, as in the recipe
FINISH = ("FINAL", "FINAL_VAR")


@dataclass
class FilterReport:
    """What was left after each step, in their order."""

    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            (
                "runs",
                "unreadable",
                "unfinished",
                "score 0",
                "one turn",
                "runs kept",
                "turns",
                "unusable",
                "repaired",
                "too long",
                "sub-calls",
                "samples",
            ),
            0,
        )
    )
    warnings: list[str] = field(default_factory=list)

    def __getitem__(self, step: str) -> int:
        return self.counts[step]

    def add(self, step: str, n: int = 1) -> None:
        self.counts[step] += n

    def __str__(self) -> str:
        c = self.counts
        return (
            f"{c['runs']} runs: {c['unreadable']} unreadable, {c['unfinished']} unfinished, {c['score 0']} with score 0, "
            f"{c['one turn']} of one turn; {c['runs kept']} kept with {c['turns']} turns: {c['unusable']} unusable, "
            f"{c['repaired']} repaired, {c['too long']} too long; {c['sub-calls']} sub-calls; {c['samples']} samples"
        )


def filter_runs(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    scores: str | Path | None = None,
    limit: int = LIMIT,
    subs: bool = False,
) -> FilterReport:
    """Write the samples of recorded runs to `out`.

    Args:
      runs: run folders, events.jsonl files, or folders that hold runs.
      scores: an output folder of `rlm eval`, or its results.jsonl; one found in `runs` is used too.
        A run without a score counts as good where it ended with an answer.
      limit: characters of a sample.
      subs: the sub-calls of kept runs are samples as well.
    Raises:
      UsageError: a path without runs, or nothing left to write (with the counts).
    """
    report = FilterReport()
    folders = [folder for path in runs for folder in _runs_in(Path(path))]
    if not folders:
        raise UsageError("training filter: give at least one run, or a folder of runs.")
    known = _scores([*map(Path, runs), *([Path(scores)] if scores is not None else [])], scores)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        for folder in dict.fromkeys(folders):
            report.add("runs")
            for sample in _samples(folder, known, limit, subs, report):
                report.add("samples")
                file.write(sample.line())
        if not report["samples"]:
            raise UsageError(f"training filter: nothing is left to write. {report}.")
    return report


def _runs_in(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(p.parent for p in path.rglob(EVENTS)) if path.is_dir() else []
    if not found:
        raise UsageError(
            f"No run at {path}: expected a run folder with {EVENTS}, or a folder of such folders."
        )
    return found


def _scores(places: Sequence[Path], named: str | Path | None) -> dict[str, float]:
    """Scores by the name of the run's folder."""
    found: dict[str, float] = {}
    for place in places:
        file = place / "results.jsonl" if place.is_dir() else place
        if named is not None and place == Path(named) and not file.is_file():
            raise UsageError(f"No scores at {place}: expected results.jsonl of rlm eval.")
        if file.name.endswith("results.jsonl") and file.is_file():
            for row in read_rows(file).values():
                if row.trajectory and row.score is not None:
                    found[Path(row.trajectory).name] = row.score
    return found


def _samples(
    folder: Path, scores: dict[str, float], limit: int, subs: bool, report: FilterReport
) -> Iterator[Conversation]:
    events = read(folder)
    report.warnings += [f"{folder}: {warning}" for warning in events.warnings]
    start = next((e for e in events if isinstance(e, RunStart)), None)
    if start is None:
        report.add("unreadable")
        report.warnings.append(f"{folder}: no run can be read from it")
        return
    end = next((e for e in reversed(events) if isinstance(e, RunEnd) and e.node == "0"), None)
    if end is None:
        report.add("unfinished")
        return
    name = folder.name if folder.is_dir() else folder.parent.name
    score = scores.get(name, scores.get(start.run, float(end.stop_reason == "answered")))
    if score <= 0:
        report.add("score 0")
        return
    turns = list(_turns(events))
    if sum(node == "0" for node, _, _, _ in turns) < 2:
        report.add("one turn")
        return
    report.add("runs kept")
    about = {
        "source": "run",
        "run": start.run,
        "score": score,
        "model": start.root,
        "scored": name in scores,
    }
    for node, turn, sent, reply in turns:
        report.add("turns")
        text, changed = repair(reply)
        if text is None:
            report.add("unusable")
            continue
        report.add("repaired", int(changed))
        messages = [spoken(m.role, m.content, 0.0 if m.role == "assistant" else None) for m in sent]
        role = "root" if node == "0" else "child"
        provenance = {**about, "role": role, "node": node, "turn": turn, "repaired": changed}
        sample = Conversation((*messages, spoken("assistant", text)), provenance)
        if sample.chars > limit:
            report.add("too long")
            continue
        yield sample
    if subs:
        yield from _sub_calls(events, about, limit, report)


def _turns(events: Trajectory) -> Iterator[tuple[str, int, list[Message], str]]:
    """(node, turn, what its model was sent, its reply) of every turn of a root or child."""
    history: dict[str, list[Message]] = {}
    task: dict[str, Message] = {}
    sent: dict[str, list[Message]] = {}
    for event in events:
        match event:
            case RunStart():  # of a session: the next run records its conversation anew
                history.clear()
                task.clear()
            case Asked():
                known = history.setdefault(event.node, [])
                known += event.messages
                task.setdefault(event.node, known[-1])
                sent[event.node] = _sent(known, task[event.node], event.left_out)
            case Replied() if event.node in sent:
                yield event.node, event.turn, sent[event.node], event.message.content
                history[event.node].append(event.message)
            case Compacted() if event.node in history:
                known = history[event.node]
                system = [m for m in known[:1] if m.role == "system"]
                summary = Message(role="assistant", content=event.summary)
                history[event.node] = [*system, task[event.node], summary]


def _sent(history: list[Message], task: Message, left_out: int) -> list[Message]:
    """The messages of a call: all but the oldest `left_out`, of which system prompt and task are
    none."""
    kept = []
    for message in history:
        if left_out and message is not task and message.role != "system":
            left_out -= 1
        else:
            kept.append(message)
    return kept


def _sub_calls(
    events: Trajectory, about: dict[str, Any], limit: int, report: FilterReport
) -> Iterator[Conversation]:
    asked = {e.node: e for e in events if isinstance(e, NodeStart) and e.kind == "lm"}
    for event in events:
        if not isinstance(event, NodeEnd) or event.node not in asked or event.error is not None:
            continue
        start, value = asked[event.node], event.value
        question = f"{start.question.strip()}\n\n" if start.question else ""
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        said = (spoken("user", question + start.prompt), spoken("assistant", text))
        sample = Conversation(
            said, {**about, "role": "sub", "node": event.node, "model": start.model}
        )
        if sample.chars > limit or not text.strip():
            report.add("too long" if text.strip() else "unusable")
            continue
        report.add("sub-calls")
        yield sample


# -- one form to finish in
def repair(text: str) -> tuple[str | None, bool]:
    """(the reply with its answer handed in from a ```repl block, whether that changed it); (None,
    False) for a reply that holds neither code nor an answer."""
    parsed = parsing.parse(Reply(text=text))
    if not parsed.cells:
        if parsed.final is None:
            return None, False
        return f"```repl\n{_handed_in(repr(parsed.final))}\n```", True
    cells = [_own_form(cell) for cell in parsed.cells]
    if cells == list(parsed.cells) and not re.search(r"(?m)^[ \t]*FINAL(_VAR)?\(", _prose(text)):
        return text, False
    before = re.split(r"```|(?m:^[ \t]*FINAL)", text, maxsplit=1)[0].strip()
    blocks = "\n\n".join(parsing.block(cell) for cell in cells)
    return f"{before}\n{blocks}".strip(), True


def _prose(text: str) -> str:
    return re.sub(r"(?ms)^[ \t]*```.*?^[ \t]*```", "", text)


def _handed_in(expression: str) -> str:
    return f'answer["content"] = {expression}\nanswer["ready"] = True'


def _own_form(code: str) -> str:
    """The cell with FINAL(x) and FINAL_VAR(x) as statements written as assignments to `answer`."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    lines = code.split("\n")
    for node in reversed(body):
        call = node.value if isinstance(node, ast.Expr) else None
        if not (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in FINISH
            and call.args
        ):
            continue
        last = node.end_lineno or node.lineno
        if node.lineno != last and lines[last - 1][node.end_col_offset :].strip():
            continue
        argument = call.args[0]
        name = (
            argument.value
            if isinstance(argument, ast.Constant) and call.func.id == "FINAL_VAR"
            else None
        )
        source = name if isinstance(name, str) else ast.get_source_segment(code, argument)
        expression = source or ast.unparse(argument)
        lines[node.lineno - 1 : last] = _handed_in(expression).split("\n")
    return "\n".join(lines)
