"""Writing a trajectory: one `write()` a line, so that a killed process leaves a readable file.

A record must never cost the run it records. Only a folder that cannot be used at the door is an error (`UsageError`);
after that a full disk, a vanished folder or a failing callback ends the recording and is remembered, nothing is raised.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import threading
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlm_runtime.context import Context
from rlm_runtime.errors import UsageError
from rlm_runtime.trajectory.events import AnyEvent, Event
from rlm_runtime.trajectory.reader import EVENTS, Trajectory, decode

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE}


class TrajectoryWriter:
    """Stamps events with the time since the run began, appends them to `<folder>/events.jsonl`, calls `on_event`.

    With `folder=None` the lines are kept in memory (`events`) up to `memory_bytes`; what comes later is counted in
    `dropped`, except the end of the run. Safe to call from many threads. `append=True` continues a folder that already
    holds a run (a session's next completion). Raises UsageError where the folder cannot be made or already holds a run.
    """

    def __init__(
        self,
        folder: Path | str | None,
        on_event: Callable[[AnyEvent], None] | None = None,
        *,
        append: bool = False,
        memory_bytes: int = 64 << 20,
    ):
        self.folder = Path(folder) if folder is not None else None
        self._listeners: list[Callable[[AnyEvent], None]] = [on_event] if on_event is not None else []
        self.error: OSError | None = None  # why recording stopped; None while it works
        self.dropped = 0  # events that are not in the record
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._memory_left = memory_bytes
        self._descriptor = -1
        if self.folder is not None:
            self._open(self.folder, append)

    def _open(self, folder: Path, append: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if append else os.O_EXCL)
        try:
            create_folder(folder)
            self._descriptor = os.open(folder / EVENTS, flags, 0o600)
        except OSError as error:
            if isinstance(error, FileExistsError) and (folder / EVENTS).exists():
                raise UsageError(f"{folder / EVENTS} already holds a run; name another folder for this one.") from None
            if error.errno not in DISK_TROUBLE:
                raise UsageError(f"The run folder {folder} cannot be made: {error.strerror}. Name another.") from error
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
        if self.folder is None:
            with self._lock:
                lines = list(self._lines)
            return Trajectory([decode(line)[0] for line in lines])
        from rlm_runtime.trajectory.reader import read

        return read(self.folder)

    def write(self, event: AnyEvent) -> AnyEvent:
        """Record `event` and return it with its time. Never raises for a failing disk or callback."""
        stamped = event.model_copy(update={"t": round(time.monotonic() - self._started, 6)})
        line = encode(stamped) + b"\n"
        with self._lock:
            if self.folder is None:
                self._keep(line, stamped)
            else:
                self._append(line)
        for listener in tuple(self._listeners):
            try:
                listener(stamped)
            except Exception as error:
                self.unlisten(listener)  # one warning, then silence: it would fail for every event
                warnings.warn(f"on_event raised {error!r}; it is not called again in this run.", stacklevel=2)
        return stamped

    def listen(self, listener: Callable[[AnyEvent], None]) -> None:
        """Call `listener` with every event from now on, as `on_event`."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[AnyEvent], None]) -> None:
        with contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    def _keep(self, line: bytes, event: Event) -> None:
        if len(line) > self._memory_left and event.type != "run_end":  # type: ignore[attr-defined]
            self.dropped += 1
            return
        self._memory_left -= len(line)
        self._lines.append(line)

    def _append(self, line: bytes) -> None:
        if self._descriptor < 0:
            self.dropped += 1
            return
        try:
            if os.fstat(self._descriptor).st_nlink == 0:
                raise FileNotFoundError(
                    errno.ENOENT, "the trajectory was removed while the run wrote it", str(self.path)
                )
            rest = memoryview(line)
            while rest:  # one call, but for a signal or a disk that fills up in the middle
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.error = error
            self.dropped += 1
            self._close()

    def blob(self, data: bytes) -> str | None:
        """Store `data` once under `blobs/` and return its name, the sha256; None where it could not be stored."""
        blobs = self.blobs
        if blobs is None:
            return None
        try:
            return store_blob(blobs, data)
        except OSError as error:
            self.error = error
            return None

    def context_fields(self, context: Context, name: str = "context") -> dict[str, Any]:
        """The fields of a `ContextLoaded` event, the context stored as a blob; without it where the disk is full."""
        try:
            return context.record(self.blobs, name)
        except OSError as error:
            self.error = self.error or error
        try:
            return context.record(None, name)
        except OSError:  # a file that is gone by now
            return {"name": name, "kind": context.kind, "path": None if context.path is None else str(context.path)}

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def close(self) -> None:
        """Idempotent. Events written later are dropped."""
        with self._lock:
            self._close()

    def __enter__(self) -> TrajectoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def encode(event: AnyEvent) -> bytes:
    """One JSON object without a newline. What is not JSON (lone surrogates, odd objects, endless depth) is kept as
    well as JSON can: escaped, as `repr`, or as a note that says so."""
    try:
        return event.model_dump_json().encode()
    except Exception:
        return json.dumps(_plain(event.model_dump(mode="python")), ensure_ascii=True, allow_nan=False).encode("ascii")


def _plain(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 10**4000 else hex(value)
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else repr(value)
    if depth > 200:
        return "(nested too deeply to record)"
    if isinstance(value, dict):
        return {k if isinstance(k, str) else repr(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, depth + 1) for v in value]
    try:
        return repr(value)[:10_000]
    except Exception:
        return f"(a {type(value).__name__} that cannot be shown)"


def create_folder(folder: Path) -> None:
    """Make a run folder appear at once, with its empty `blobs/`, so that a listing never meets half of one."""
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
        if not (folder.is_dir() and error.errno in (errno.ENOTEMPTY, errno.EEXIST)):  # another run was first
            raise


def run_folder(log_dir: Path | str, run: str) -> Path:
    """`<log_dir>/<UTC time>-<run>`: sorts by time. `run` is the id in `RunStart`; odd characters become `_`."""
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
