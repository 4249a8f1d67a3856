"""The sync API: one coroutine to its end on a private event loop, Ctrl-C included.

The first Ctrl-C cancels the run, which then returns what it has; the second raises
KeyboardInterrupt at once. Inside a running event loop (a notebook) a helper thread has the loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]


def run(work: Work[T]) -> T:
    """`await work()` on a private loop. A cancellation by Ctrl-C reaches the coroutine as
    CancelledError; what it returns in spite of that is returned."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        with asyncio.Runner() as runner:
            return runner.run(work())
    with LoopThread() as thread:
        return thread.run(work)


class LoopThread:
    """An event loop in a thread of its own, for a session's many sync calls or for a caller that
    has a loop already."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop  # there once `_ready` is set
        self._thread = threading.Thread(target=self._main, name="rlm-loop", daemon=True)
        self._thread.start()
        self._ready.wait()

    def _main(self) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            self._loop.call_soon(self._ready.set)
            self._loop.run_forever()
            # Leaving the runner cancels what is left, and lets it end.

    def run(self, work: Work[T]) -> T:
        """`await work()` in the thread; on Ctrl-C here as in `run` above."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(work()))
            tasks[0].add_done_callback(deliver)

        def deliver(task: asyncio.Task[T]) -> None:
            if task.cancelled():
                outcome.set_exception(KeyboardInterrupt())
            elif (error := task.exception()) is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(task.result())

        def interrupt() -> None:
            if tasks:
                tasks[0].cancel()
            elif not outcome.done():  # Ctrl-C came even before `start` was handed over
                outcome.set_exception(KeyboardInterrupt())

        with _ctrl_c_raises():
            try:
                self._loop.call_soon_threadsafe(start)
                return _wait(outcome)
            except KeyboardInterrupt:
                if not outcome.done():
                    self._loop.call_soon_threadsafe(interrupt)
                return _wait(outcome)

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)

    def __enter__(self) -> LoopThread:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _wait(outcome: concurrent.futures.Future[T]) -> T:
    """In short waits: a signal that comes just before a thread begins to wait does not end the
    wait."""
    while not outcome.done():
        concurrent.futures.wait([outcome], timeout=0.25)
    return outcome.result()


@contextlib.contextmanager
def _ctrl_c_raises() -> Iterator[None]:
    """While the main thread waits, Ctrl-C is KeyboardInterrupt: `asyncio.run` around it, which this
    call blocks, would only make a note of the first one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler, None):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
