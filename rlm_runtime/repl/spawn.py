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


class _Spawner:
    def __init__(self):
        self._lock = threading.Lock()
        self._users, self._jobs = 0, None

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
            if self._users == 0:
                self._jobs.put(None)
                self._jobs = None

    async def popen(self, argv: Sequence[str], **options) -> subprocess.Popen:
        """Raises OSError as Popen does. Cancelled, it first ends what it has begun to start."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._jobs.put((loop, future, argv, options))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(
                lambda f: f.cancelled() or f.exception() or _discard(f.result())
            )
            await asyncio.wait([future])
            raise


def _serve(jobs: queue.SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        loop, future, argv, options = job
        process, error = None, None
        try:
            process = subprocess.Popen(argv, **options)
        except Exception as problem:
            error = problem
        try:
            loop.call_soon_threadsafe(_deliver, future, process, error)
        except RuntimeError:  # the loop is closed
            _discard(process)
        del job, loop, future, process, error


def _deliver(future: asyncio.Future, process, error) -> None:
    if future.done():
        _discard(process)
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(process)


def _discard(process) -> None:
    if process is not None:
        with suppress(OSError):
            process.kill()
        process.wait()


SPAWNER = _Spawner()
