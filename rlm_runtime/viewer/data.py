"""What the page asks for: the runs of a folder, and the events of a run, long texts cut until they
are looked at.

The events are handed on as they lie in the file, as plain JSON objects: a damaged line becomes an
object of type "damaged", an event of a newer version passes unchanged. An index of offsets is all
that is held of the long ones.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rlm_runtime.errors import UsageError
from rlm_runtime.trajectory import EVENTS, events_file, lenient

CUT = 4_000  # characters of a text in the first load; half as long once a run has many events
TAIL = 256 << 10  # bytes at the end of a file in which a listing looks for the end of the run
LONGEST = 64 << 20  # bytes of a line that a listing reads
DEEPEST = 4  # folders below the one given in which runs are looked for


class Library:
    """The runs under one file or folder, by an id that is the folder's path in it. Nothing outside
    is ever opened."""

    def __init__(self, path: Path | str):
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            events_file(self.path)  # raises UsageError with the reason
        if (self.path / EVENTS).is_file():  # the folder of one run
            self.path = self.path / EVENTS
        self._open: dict[str, EventsFile] = {}
        self._lock = threading.Lock()

    def files(self) -> Iterator[tuple[str, Path]]:
        if self.path.is_file():
            yield self.path.parent.name or "run", self.path
            return
        for folder, below, names in os.walk(self.path):  # does not follow links
            here = Path(folder)
            depth = len(here.relative_to(self.path).parts)
            below[:] = (
                sorted(b for b in below if not b.startswith(".") and b != "blobs")
                if depth < DEEPEST
                else []
            )
            if EVENTS in names and not (here / EVENTS).is_symlink():
                yield here.relative_to(self.path).as_posix() if depth else here.name, here / EVENTS

    def run(self, name: str) -> EventsFile:
        """Raises UsageError for an id that is no run of this library."""
        with self._lock:
            if name in self._open and self._open[name].path.is_file():
                return self._open[name]
            for found, file in self.files():
                if found == name:
                    self._open[name] = EventsFile(file)
                    return self._open[name]
        raise UsageError(f"No run {name!r} under {self.path}.")

    def listing(self) -> list[dict[str, Any]]:
        """Newest first."""
        rows = [row for name, file in self.files() if (row := _row(name, file))]
        return sorted(rows, key=lambda r: (r["started_at"], r["id"]), reverse=True)


def _row(name: str, file: Path) -> dict[str, Any] | None:
    try:
        with open(file, "rb") as lines:
            start = loads(lines.readline(LONGEST))
            size = os.fstat(lines.fileno()).st_size
            modified = os.fstat(lines.fileno()).st_mtime
            last = _last_lines(lines, size)
            marks = [e for e in map(loads, last) if e.get("type") in ("run_start", "run_end")]
    except OSError:
        return None
    end: dict[str, Any] = next((e for e in reversed(marks) if e.get("node", "0") == "0"), {})
    end = end if end.get("type") == "run_end" else {}
    usage = end.get("usage") if isinstance(end.get("usage"), dict) else {}
    answer = end.get("answer")
    answer = answer if isinstance(answer, str) else json.dumps(answer) if answer is not None else ""
    return {
        "id": name,
        "bytes": size,
        "modified": modified,
        "complete": bool(end),
        "started_at": str(start.get("started_at") or ""),
        "question": str(start.get("question") or "")[:400],
        "root": str(start.get("root") or ""),
        "sub": str(start.get("sub") or ""),
        "stop_reason": str(end.get("stop_reason") or ""),
        "error": str(end.get("error") or "")[:400],
        "answer": answer[:400],
        "turns": end.get("turns"),
        "seconds": end.get("seconds"),
        "usage": usage,
    }


def _last_lines(file: BinaryIO, size: int) -> list[bytes]:
    """The lines in the last `TAIL` bytes; of a longer one, as an answer of megabytes makes it, the
    whole."""
    tail = TAIL
    while True:
        file.seek(max(0, size - tail))
        lines = file.read(tail).split(b"\n")
        if sum(map(bool, lines)) > 1 or tail >= min(size, LONGEST):
            return lines
        tail *= 8


class EventsFile:
    """One events file: where each line lies, and each event with its long texts cut. Grows as the
    file does."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[tuple[int, int]] = []
        self.slim: list[str] = []  # JSON
        self.complete = False
        self._offset = 0
        self._lock = threading.Lock()

    def refresh(self) -> None:
        with self._lock, open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._offset:  # replaced by another run
                self.lines, self.slim, self.complete, self._offset = [], [], False, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written, or cut for good
                if line.strip():
                    event = loads(line)
                    self.lines.append((self._offset, len(line)))
                    cut = CUT if len(self.slim) < 5_000 else CUT // 20
                    # No text in a short line can be longer than the line.
                    self.slim.append(dumps(event if len(line) <= cut else shorten(event, cut)))
                    if (
                        event.get("type") in ("run_start", "run_end")
                        and event.get("node", "0") == "0"
                    ):
                        # a session may go on after an end
                        self.complete = event["type"] == "run_end"
                self._offset += len(line)

    def since(self, first: int) -> str:
        """Events from number `first` on, as JSON."""
        self.refresh()
        events = self.slim[max(first, 0) :]
        rest = dumps({"next": len(self.slim), "complete": self.complete})
        return f'{{"events":[{",".join(events)}],{rest[1:]}'

    def whole(self, number: int) -> dict[str, Any]:
        """One event with nothing cut. Raises UsageError where there is none of this number."""
        self.refresh()
        if not 0 <= number < len(self.lines):
            raise UsageError(f"No event {number}; the run has {len(self.lines)}.")
        offset, length = self.lines[number]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return loads(file.read(length))

    def search(self, words: str, most: int = 500) -> dict[str, Any]:
        """Where `words` stands, in any text of any event, whatever its case; at most `most` hits,
        one a text."""
        self.refresh()
        wanted = re.compile(re.escape(words), re.IGNORECASE)
        hits: list[dict[str, Any]] = []
        with open(self.path, "rb") as file:
            for number, (offset, length) in enumerate(self.lines):
                file.seek(offset)
                for field, found in texts(loads(file.read(length))):
                    if not (match := wanted.search(found)):
                        continue
                    first, last = match.span()
                    around = {
                        "before": found[max(0, first - 40) : first],
                        "after": found[last : last + 80],
                    }
                    hits.append({"event": number, "field": field, "match": match.group(), **around})
                    if len(hits) >= most:
                        return {"hits": hits, "more": True}
        return {"hits": hits, "more": False}

    def everything(self) -> list[dict[str, Any]]:
        """All events, whole."""
        self.refresh()
        with open(self.path, "rb") as file:
            return [loads(line) for line in file if line.strip()]


def loads(line: bytes) -> dict[str, Any]:
    """The JSON object of a line, or an object that says the line is damaged."""
    try:
        try:
            event = json.loads(line)
        except ValueError:
            event = lenient(line)
        if isinstance(event, dict):
            return event
        problem = "not a JSON object"
    except (ValueError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    return {"type": "damaged", "problem": problem, "text": line[:2_000].decode("utf-8", "replace")}


def shorten(event: dict[str, Any], cut: int) -> dict[str, Any]:
    """The event with every text cut to `cut` characters; `cut: true` where one was. Code stays
    whole if it can."""
    was_cut = False

    def short(value: Any, key: str = "") -> Any:
        nonlocal was_cut
        if isinstance(value, str):
            allowed = 4 * cut if key == "code" else cut
            if len(value) > allowed:
                was_cut = True
                return value[:allowed]
            return value
        if isinstance(value, dict):
            return {k: short(v, k) for k, v in value.items()}
        if isinstance(value, list):
            if len(value) > 1_000:
                was_cut = True
            return [short(v) for v in value[:1_000]]
        return value

    result: dict[str, Any] = short(event)
    if was_cut:
        result["cut"] = True
    return result


SKIPPED = {"type", "node", "parent", "role", "t", "finish_reason", "kind"}


def texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text in an event with the dotted name of its field."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in SKIPPED or field:
                yield from texts(inner, f"{field}.{key}" if field else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, field)


def dumps(value: Any) -> str:
    """ASCII JSON: lone surrogates and U+2028 travel as escapes. NaN and infinities, which JSON has
    not, as text."""
    try:
        return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return repr(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
