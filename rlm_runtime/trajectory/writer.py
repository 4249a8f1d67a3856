"""Writing a trajectory: one `write()` a line, so that a killed process leaves a readable file.

A record must never cost the run it records. Only a folder that cannot be used at the start is an
error (`UsageError`); after that a full disk, a vanished folder or a failing callback ends the
recording and is remembered, nothing is raised.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlm_runtime.context import Context
from rlm_runtime.errors import UsageError
from rlm_runtime.replies import pieces
from rlm_runtime.replies.reader import size_of
from rlm_runtime.trajectory.events import AnyEvent, RunEnd, RunStart
from rlm_runtime.trajectory.reader import EVENTS, Trajectory, decode

LOG_BYTES = 256 << 20  # a record may take beside its contexts and its last answer
SHARE = 4  # an event takes at most this part of what is left; else its long texts are cut
DIGIT_BITS = 13_000  # of an integer that Python reads back; a longer one is recorded in hex
TEXT = 8_000  # characters of a text that is cut
# characters of an event that is encoded on a thread: it would hold its run up for too long
LONG = 1 << 17
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE}


class TrajectoryWriter:
    """Stamps events with the time since the run began, appends them to `<folder>/events.jsonl`,
    calls `on_event`.

    The record takes at most `disk_bytes`, or, with `folder=None`, `memory_bytes` of memory
    (`events`): a large event is recorded with its long texts cut, counted in `shortened`; one that
    does not fit even so is counted in `dropped`. The beginning and the end of the run are always
    recorded. Safe to call from many threads. `append=True` continues a folder that already holds a
    run (a session's next completion). Raises UsageError where the folder cannot be made or already
    holds a run.
    """

    def __init__(
        self,
        folder: Path | str | None,
        on_event: Callable[[AnyEvent], None] | None = None,
        *,
        append: bool = False,
        memory_bytes: int = 64 << 20,
        disk_bytes: int = LOG_BYTES,
    ):
        self.folder = Path(folder) if folder is not None else None
        self._listeners: list[Callable[[AnyEvent], None]] = (
            [on_event] if on_event is not None else []
        )
        self.error: OSError | None = None  # why recording stopped; None while it works
        self._dropped = self._shortened = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        # a long event that is being encoded, and those behind it
        self._waiting: deque[AnyEvent] = deque()
        self._written = threading.Condition(self._lock)
        self._lines: list[bytes] = []
        self._left = memory_bytes if self.folder is None else disk_bytes
        self._descriptor = -1
        if self.folder is not None:
            self._open(self.folder, append)

    def _open(self, folder: Path, append: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if append else os.O_EXCL)
        try:
            create_folder(folder)
            self._descriptor = os.open(folder / EVENTS, flags, 0o600)
            self._left -= os.fstat(self._descriptor).st_size
        except OSError as error:
            if isinstance(error, FileExistsError) and (folder / EVENTS).exists():
                raise UsageError(
                    f"{folder / EVENTS} already holds a run; name another folder for this one."
                ) from None
            if error.errno not in DISK_TROUBLE:
                raise UsageError(
                    f"The run folder {folder} cannot be made: {error.strerror}. Name another."
                ) from error
            self.error = error

    @property
    def blobs(self) -> Path | None:
        """Where blobs of this run go; None without a folder, or once recording has stopped."""
        return self.folder / "blobs" if self.folder is not None and self.error is None else None

    @property
    def path(self) -> Path | None:
        return self.folder / EVENTS if self.folder is not None else None

    @property
    def events(self) -> Trajectory:
        """The recorded events: from memory, or read back from the file."""
        self.flush()
        if self.folder is None:
            with self._lock:
                lines = list(self._lines)
            return Trajectory([decode(line)[0] for line in lines])
        from rlm_runtime.trajectory.reader import read

        return read(self.folder)

    def write(self, event: AnyEvent) -> AnyEvent:
        """Record `event` and return it with its time. Never raises for a failing disk or
        callback."""
        stamped = event.model_copy(update={"t": round(time.monotonic() - self._started, 6)})
        long, first = size_of_event(stamped) > LONG, False
        line = b"" if long else encode(stamped, long) + b"\n"
        with self._lock:
            if not long and not self._waiting:
                self._record(line, stamped)
            else:
                self._waiting.append(stamped)
                first = len(self._waiting) == 1
        if first:
            try:
                threading.Thread(target=self._write_waiting, name="rlm-record").start()
            except RuntimeError:  # no thread can be had
                self._write_waiting()
        for listener in tuple(self._listeners):
            try:
                listener(stamped)
            except Exception as error:
                self.unlisten(listener)  # one warning, then silence: it would fail for every event
                warnings.warn(
                    f"on_event raised {error!r}; it is not called again in this run.", stacklevel=2
                )
        return stamped

    def _write_waiting(self) -> None:
        """Write what waits, in its order, until nothing does."""
        while True:
            event = self._waiting[0]
            try:
                line = encode(event, size_of_event(event) > LONG) + b"\n"
            except Exception:  # no memory for it, perhaps
                line = b""
            with self._lock:
                if line:
                    self._record(line, event)
                else:
                    self._dropped += 1
                self._waiting.popleft()
                if not self._waiting:
                    self._written.notify_all()
                    return

    @property
    def dropped(self) -> int:
        """Events that are not in the record."""
        self.flush()
        return self._dropped

    @property
    def shortened(self) -> int:
        """Events that are in the record with their long texts cut."""
        self.flush()
        return self._shortened

    @property
    def behind(self) -> bool:
        """Whether events wait to be recorded."""
        return bool(self._waiting)

    def flush(self) -> None:
        """Wait until all events are recorded."""
        with self._lock:
            self._written.wait_for(lambda: not self._waiting)

    def listen(self, listener: Callable[[AnyEvent], None]) -> None:
        """Call `listener` with every event from now on, as `on_event`."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[AnyEvent], None]) -> None:
        with contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    def _record(self, line: bytes, event: AnyEvent) -> None:
        if len(line) > self._left // SHARE and not isinstance(event, RunStart | RunEnd):
            line = encode_short(event) + b"\n"
            if len(line) > self._left // SHARE:
                self._dropped += 1
                return
            self._shortened += 1
        self._left -= len(line)
        if self.folder is None:
            self._lines.append(line)
        else:
            self._append(line)

    def _append(self, line: bytes) -> None:
        if self._descriptor < 0:
            self._dropped += 1
            return
        try:
            if os.fstat(self._descriptor).st_nlink == 0:
                raise FileNotFoundError(
                    errno.ENOENT,
                    "the trajectory was removed while the run wrote it",
                    str(self.path),
                )
            rest = memoryview(line)
            while rest:  # one call, but for a signal or a disk that fills up in the middle
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.error = error
            self._dropped += 1
            self._close()

    def blob(self, data: bytes) -> str | None:
        """Store `data` once under `blobs/` and return its name, the sha256; None where it could not
        be stored."""
        blobs = self.blobs
        if blobs is None:
            return None
        try:
            return store_blob(blobs, data)
        except OSError as error:
            self.error = error
            return None

    def context_fields(
        self, context: Context, name: str = "context", *, whole: bool = True
    ) -> dict[str, Any]:
        """The fields of a `ContextLoaded` event, the context stored as a blob; without it where the
        disk is full, or where it is not to be stored `whole` in any case and is too large for what
        is left of the record."""
        blobs, size = self.blobs, context.bytes
        if not whole and blobs is not None:
            with self._lock:
                if size is None or size > self._left // SHARE:
                    blobs = None
                    self._shortened += 1
                else:
                    self._left -= size
        try:
            return context.record(blobs, name)
        except OSError as error:
            self.error = self.error or error
        try:
            return context.record(None, name)
        except OSError:  # a file that is gone by now
            return {
                "name": name,
                "kind": context.kind,
                "path": None if context.path is None else str(context.path),
            }

    @property
    def note(self) -> str | None:
        """What the record does not hold, as a sentence for the user; None where it holds
        everything."""
        if self.error is not None:
            return f"The trajectory is incomplete ({self.error}); {self._dropped} events were not recorded."
        if self._dropped or self._shortened:
            lost = f"{self._dropped} events were not recorded, {self._shortened} with their long texts cut"
            more = "; pass log_dir=... to record more of them" if self.folder is None else ""
            return f"The trajectory has reached what it may take: {lost}{more}."
        return None

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def close(self) -> None:
        """Idempotent. Events written later are dropped."""
        self.flush()
        with self._lock:
            self._close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def encode(event: AnyEvent, long: bool = False) -> bytes:
    """One JSON object without a newline, written in pieces where it is long. What is not JSON (lone
    surrogates, odd objects, endless depth) is kept as well as JSON can: escaped, as `repr`, or as a
    note that says so."""
    try:
        if not long:
            return event.model_dump_json().encode()
    except Exception:  # what is no JSON: below
        pass
    return pieces.dumps(_plain(event.model_dump(mode="python")))


def encode_short(event: AnyEvent) -> bytes:
    """The same with every long text cut."""
    return pieces.dumps(shorten(_plain(event.model_dump(mode="python"))))


def size_of_event(event: AnyEvent) -> int:
    """About how many characters an event has, counted up to more than LONG."""
    return size_of(event, LONG + 1)


def shorten(value: Any) -> Any:
    """A JSON value whose texts keep their beginning and end, and the hash of the whole."""
    if isinstance(value, dict):
        return {shorten(k): shorten(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [shorten(v) for v in value]
    if not isinstance(value, str) or len(value) <= TEXT:
        return value
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
    half = TEXT // 2
    note = (
        f"[... {len(value) - 2 * half:,} characters were not recorded; sha256 of all: {digest} ...]"
    )
    return f"{value[:half]}\n{note}\n{value[-half:]}"


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < DIGIT_BITS else hex(value)
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else repr(value)
    if depth > 200:
        return "(nested too deeply to record)"
    if isinstance(value, dict):
        return {
            k if isinstance(k, str) else repr(k): _plain(v, depth + 1) for k, v in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, depth + 1) for v in value]
    try:
        return repr(value)[:10_000]
    except Exception:
        return f"(a {type(value).__name__} that cannot be shown)"


def create_folder(folder: Path) -> None:
    """Make a run folder appear at once, with its empty `blobs/`, so that a listing never meets half
    of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        (folder / "blobs").mkdir(mode=0o700, exist_ok=True)
        return
    draft = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    draft.mkdir(mode=0o700)
    try:
        (draft / "blobs").mkdir(mode=0o700)
        os.rename(draft, folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            (draft / "blobs").rmdir()
            draft.rmdir()
        # another run was first
        if not (folder.is_dir() and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):
            raise


def run_folder(log_dir: Path | str, run: str) -> Path:
    """`<log_dir>/<UTC time>-<run>`: sorts by time. `run` is the id in `RunStart`; odd characters
    become `_`."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return Path(log_dir) / f"{stamp}-{re.sub(r'[^A-Za-z0-9._-]', '_', run)[:80]}"


def store_blob(blobs: Path, data: bytes) -> str:
    """Write `data` to `blobs/<sha256>` unless it is there, and return the name. Raises OSError."""
    name = hashlib.sha256(data).hexdigest()
    target = blobs / name
    if target.exists():
        return name
    blobs.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = blobs / f".{name[:16]}.{secrets.token_hex(4)}"
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(draft, target)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    return name
