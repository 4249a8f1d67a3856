"""Where the wall time of a run goes, over all its restarts, and who is slow.

`goodput.json` in the run directory has one entry for each time the run was started: when it began,
when it was last heard of, which steps it did, and its seconds by kind:

    start      from the command to the first step: data, restoring, initialising
    compile    tracing and compiling
    input      waiting for rows
    step       training steps; what goodput counts as good
    evaluate   held-out evaluation
    save       what a save holds up; the rest of it is in the background
    rewind     going back after a bad step
    other      none of these

Over several entries come two more: `down`, between the last sign of one start and the next one's
beginning, and `again`, steps that were done but lost because no checkpoint had them. Goodput is the
share of `step` in everything."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = ("start", "compile", "input", "step", "evaluate", "save", "rewind", "other")
FILE = "goodput.json"
EVERY = 10.0  # seconds between two writes of the file
SLOW = 1.5  # times the median of the hosts


class Goodput:
    """Stop-watch of one start. `path`: of the file, None on all hosts but one."""

    def __init__(self, path: Path | None):
        self._path, self._earlier = path, _read(path)
        self._begin = time.time()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", time.perf_counter()
        self._steps = [0, 0]  # the first one done and the last
        self._written = time.perf_counter()

    def enter(self, kind: str) -> str:
        """Counts time as this kind from now on. Returns the kind before."""
        now, before = time.perf_counter(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Counts the time inside this context as this kind."""
        before = self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """By kind, of this start."""
        self.enter(self._kind)
        return dict(self._seconds)

    def step(self, step: int) -> None:
        """`step` has been done; the file is brought up to date every few seconds."""
        self._steps = [self._steps[0] or step, step]
        if time.perf_counter() - self._written > EVERY:
            self.write()

    def record(self) -> dict[str, Any]:
        """Numbers over all starts: `goodput`, `share/<kind>`, `starts`, `wall_s`, `steps_again`."""
        return summarize([*self._earlier, self._entry()])

    def write(self) -> None:
        """Writes the file. An error while writing is ignored: the run goes on without the
        record."""
        self._written = time.perf_counter()
        if self._path is None:
            return
        draft = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            draft.write_text(
                json.dumps([*self._earlier, self._entry()], indent=1) + "\n", encoding="utf-8"
            )
            draft.replace(self._path)

    def _entry(self) -> dict[str, Any]:
        seconds = self.seconds()
        return {
            "begin": self._begin,
            "end": self._begin + sum(seconds.values()),
            "first": self._steps[0],
            "last": self._steps[1],
            "seconds": seconds,
        }


def summarize(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of `Goodput.record` from the entries of the file, in order."""
    total = dict.fromkeys((*KINDS, "down", "again"), 0.0)
    lost = 0
    for entry, after in zip(entries, [*entries[1:], None], strict=True):
        for kind, seconds in entry["seconds"].items():
            total[kind] += seconds
        if after is None:
            continue
        total["down"] += max(after["begin"] - entry["end"], 0.0)
        done = entry["last"] - entry["first"] + 1 if entry["first"] else 0
        again = (
            min(max(entry["last"] - after["first"] + 1, 0), done) if done and after["first"] else 0
        )
        share = again / done * entry["seconds"]["step"] if again else 0.0
        total["again"], total["step"], lost = (
            total["again"] + share,
            total["step"] - share,
            lost + again,
        )
    wall = sum(total.values())
    return {
        "goodput": total["step"] / wall if wall else 0.0,
        **{f"share/{kind}": seconds / wall if wall else 0.0 for kind, seconds in total.items()},
        "wall_s": wall,
        "starts": len(entries),
        "steps_again": lost,
    }


def stragglers(reports: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Lists over the hosts, by rank, of what each last reported: `own_s`, seconds a step it kept
    the others waiting (reading rows and dispatching), `input_s` of them reading, and `step_s` from
    step to step; and `slow`, the names of those whose own time is SLOW times the median and more
    than it by a tenth of the step. {} until all have reported.

    All hosts of a synchronous step take as long as the slowest: only what each does before it joins
    tells them apart.
    """
    if not reports or any("own_s" not in r for r in reports):
        return {}
    own = [float(r["own_s"]) for r in reports]
    typical, step = (
        statistics.median_low(own),
        statistics.median(float(r["step_s"]) for r in reports),
    )
    slow = [
        name
        for name, s in zip(names, own, strict=True)
        if s > SLOW * typical and s - typical > 0.1 * step
    ]
    return {
        "own_s": own,
        "input_s": [float(r["input_s"]) for r in reports],
        "step_s": [float(r["step_s"]) for r in reports],
        "slow": slow,
    }


def _read(path: Path | None) -> list[dict[str, Any]]:
    """Entries of earlier starts; empty if the file is missing or has another form."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path else []
        summarize([*entries, *entries[-1:]])
        return entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


class Clock:
    """Time spent stepping: evaluation and saving are not in it, nor is the first step, which
    compiles."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._total = 0.0
        self._counted, self._steps, self._first = 0.0, 0, True
        self._input, self._dispatch, self._joined = 0.0, 0.0, 0

    def tick(self) -> None:
        """Counts a finished step."""
        if self._first:
            self._first = False
            self._counted = self.total()
        else:
            self._steps += 1

    def pause(self) -> None:
        self._total += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def total(self) -> float:
        """Seconds so far."""
        return self._total + time.perf_counter() - self._since

    def rate(self) -> float:
        """Steps a second since the last call."""
        elapsed, steps = self.total() - self._counted, self._steps
        self._counted, self._steps = self.total(), 0
        return steps / elapsed if elapsed > 0 else 0.0

    def own(self, input_s: float, dispatch_s: float) -> None:
        """What this host did before it joined a step: reading rows, and handing the step to the
        device."""
        self._input, self._dispatch = self._input + input_s, self._dispatch + dispatch_s
        self._joined += 1

    def pace(self, rate: float) -> dict[str, float]:
        """Seconds a step since the last call, for `goodput.stragglers`: `own_s`, of it `input_s`,
        and `step_s`."""
        steps = max(self._joined, 1)
        found = {
            "own_s": (self._input + self._dispatch) / steps,
            "input_s": self._input / steps,
            "step_s": 1 / rate if rate else 0.0,
        }
        self._input, self._dispatch, self._joined = 0.0, 0.0, 0
        return found
