"""Reading a trajectory: whole, or as it grows. A damaged line costs that line and a warning, never
the rest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlm_runtime.errors import UsageError
from rlm_runtime.trajectory.events import AnyEvent, RunEnd, RunStart, event_adapter, parse_event

EVENTS = "events.jsonl"


class Trajectory(list[AnyEvent]):
    """Events in order, with what could not be read: `warnings`, one sentence each."""

    def __init__(
        self,
        events: Iterable[AnyEvent] = (),
        path: Path | None = None,
        warnings: Iterable[str] = (),
    ):
        super().__init__(events)
        self.path = path  # of events.jsonl; blobs lie beside it
        self.warnings = list(warnings)

    @property
    def complete(self) -> bool:
        """Whether the root run (of a session: the latest) has ended; False for one that was killed
        or still goes."""
        latest = next(
            (e for e in reversed(self) if isinstance(e, RunStart | RunEnd) and e.node == "0"), None
        )
        return isinstance(latest, RunEnd)


def events_file(path: Path | str) -> Path:
    """`path` is a run folder or the file itself. Raises UsageError where there is no trajectory."""
    path = Path(path)
    file = path / EVENTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(
            f"No trajectory at {path}: expected a run folder with {EVENTS}, or such a file."
        )
    return file


def lenient(line: bytes) -> Any:
    """`json.loads` that gives integers too long for Python as text. Raises ValueError,
    RecursionError."""
    return json.loads(line, parse_int=lambda digits: int(digits) if len(digits) < 4_000 else digits)


def decode(line: bytes) -> tuple[AnyEvent, str | None]:
    """One event, and a remark where something in it had to be left out. Raises ValueError for a
    damaged line."""
    try:
        return parse_event(line), None
    except ValidationError:
        pass
    # The slow road: json.loads reads the lone surrogates and the constants the strict parser
    # refuses.
    try:
        value = lenient(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    try:
        return event_adapter().validate_python(value), None
    except ValidationError as error:
        extra = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
        if len(extra) != error.error_count():
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(
                f"no known event ({'.'.join(map(str, first['loc']))}: {first['msg']})"
            ) from None
    # A newer version wrote fields this one does not know; the rest is worth having.
    for tag, *keys, last in extra:
        del tag  # the first part of a location is the union's tag
        place: Any = value
        for key in keys:
            place = place[key]
        del place[last]
    try:
        return event_adapter().validate_python(value), "unknown fields left out: " + ", ".join(
            ".".join(map(str, e[1:])) for e in extra
        )
    except ValidationError as error:
        raise ValueError(f"no known event ({error.error_count()} problems)") from None


def read(path: Path | str) -> Trajectory:
    """All events of a run folder or file. Cut or damaged lines are left out and named in
    `.warnings`.

    Raises UsageError where there is no such file or it cannot be opened.
    """
    file = events_file(path)
    trajectory = Trajectory(path=file)
    try:
        with open(file, "rb") as lines:
            # binary lines end at \n only, whatever the text holds
            for number, line in enumerate(lines, 1):
                _take(trajectory, number, line)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from error
    return trajectory


def _take(trajectory: Trajectory, number: int, line: bytes) -> None:
    if not line.strip():
        return
    try:
        event, remark = decode(line)
    except ValueError as error:
        cut = (
            ""
            if line.endswith(b"\n")
            else " (the last line is cut: the run was killed, or still writes)"
        )
        trajectory.warnings.append(f"line {number}: {error}{cut}")
        return
    trajectory.append(event)
    if remark:
        trajectory.warnings.append(f"line {number}: {remark}")


class Tail:
    """Reads what was added since the last `poll`. The file need not exist yet; a cut last line
    waits for its rest."""

    def __init__(self, path: Path | str):
        path = Path(path)
        self.path = path if path.suffix == ".jsonl" or path.is_file() else path / EVENTS
        self.offset = 0
        self.lines = 0
        self.trajectory = Trajectory(path=self.path)

    def poll(self) -> list[AnyEvent]:
        """New events; they are also in `trajectory`, damaged lines in its warnings."""
        before = len(self.trajectory)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self.offset += len(line)
                    self.lines += 1
                    _take(self.trajectory, self.lines, line)
        except FileNotFoundError:
            pass
        return self.trajectory[before:]


def follow(
    path: Path | str, *, every: float = 0.2, stop: Callable[[], bool] = lambda: False
) -> Iterator[AnyEvent]:
    """Events as they are written, until the root run ends or `stop()` is true; looks `every`
    seconds."""
    tail = Tail(path)
    while True:
        last = stop()  # asked before looking, so that what was written until then is still yielded
        yield from tail.poll()
        if last or tail.trajectory.complete:
            return
        time.sleep(every)
