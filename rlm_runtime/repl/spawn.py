"""Starting worker processes from a thread that lives as long as any worker does.

The kernel kills a worker when its parent *thread* ends (that is how no worker outlives its host),
so the thread that starts workers must not be one that comes and goes, like those of a web server.
"""

from __future__ import annotations

import asyncio
import queue
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, TypeAlias, TypedDict, Unpack

_Worker: TypeAlias = "subprocess.Popen[bytes]"


class SpawnOptions(TypedDict, total=False):
    """What a worker is started with, as `subprocess.Popen` takes it."""

    env: dict[str, str]
    cwd: str
    close_fds: bool
    start_new_session: bool
    stdin: int
    stdout: int
    stderr: int
    pass_fds: tuple[int, ...]


class _SpawnJob(NamedTuple):
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[_Worker]
    argv: Sequence[str]
    options: SpawnOptions


_Jobs: TypeAlias = "queue.SimpleQueue[_SpawnJob | None]"


class _Spawner:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._jobs: _Jobs | None = None

    def acquire(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._jobs = queue.SimpleQueue()
                threading.Thread(
                    target=_serve, args=(self._jobs,), name="rlm-spawner", daemon=True
                ).start()

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._jobs is not None:
                self._jobs.put(None)
                self._jobs = None

    async def popen(self, argv: Sequence[str], **options: Unpack[SpawnOptions]) -> _Worker:
        """Raises OSError as Popen does. Cancelled, it first ends what it has begun to start."""
        assert self._jobs is not None, "acquired"
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Worker] = loop.create_future()
        self._jobs.put(_SpawnJob(loop, future, argv, options))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_discard_result)
            await asyncio.wait([future])
            raise


def _serve(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        loop, future, argv, options = job
        process: _Worker | None = None
        error: Exception | None = None
        try:
            process = subprocess.Popen(argv, **options)
        except Exception as problem:
            error = problem
        try:
            loop.call_soon_threadsafe(_deliver, future, process, error)
        except RuntimeError:  # the loop is closed
            _discard(process)
        del job, loop, future, process, error


def _deliver(
    future: asyncio.Future[_Worker], process: _Worker | None, error: Exception | None
) -> None:
    if future.done():
        _discard(process)
    elif error is not None:
        future.set_exception(error)
    elif process is not None:
        future.set_result(process)


def _discard_result(future: asyncio.Future[_Worker]) -> None:
    if not future.cancelled() and future.exception() is None:
        _discard(future.result())


def _discard(process: _Worker | None) -> None:
    if process is not None:
        with suppress(OSError):
            process.kill()
        process.wait()


SPAWNER = _Spawner()
