"""Admission control: a bounded number of running requests, a bounded queue, and no new ones while
the server stops."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from rlm_runtime.serve.http.errors import ApiError, stopping


class Admission:
    """First come, first served. All on one event loop."""

    def __init__(self, max_runs: int, max_queue: int, queue_seconds: float):
        self.max_runs, self.max_queue, self.queue_seconds = max_runs, max_queue, queue_seconds
        self.running = 0
        self.draining = False
        # of running requests; cancelled when a drain is over
        self.tasks: set[asyncio.Task[Any]] = set()
        self._inside = 0  # in the building: reading their body, waiting or running
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_seconds = 10.0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """Held by a request from before its body is read, so that bodies in memory are bounded too.

        Raises ApiError: 503 while draining, 429 when everything is full.
        """
        if self.draining:
            raise stopping(close=True)
        if self._inside >= self.max_runs + self.max_queue:
            raise self._busy(
                f"{self.running} runs are going on and {self._inside - self.running} wait"
            )
        self._inside += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._idle.set()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[float]:
        """One of the running places, once there is one; gives the seconds waited. Raises ApiError
        (429)."""
        began = time.monotonic()
        if self.running >= self.max_runs or self._waiting:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                async with asyncio.timeout(self.queue_seconds):
                    await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():
                    self._next()  # the place was given to us at the same moment: pass it on
                elif turn in self._waiting:
                    self._waiting.remove(turn)
                if isinstance(error, TimeoutError):
                    raise self._busy(f"no place became free in {self.queue_seconds:g} s") from None
                raise
        else:
            self.running += 1
        start = time.monotonic()
        try:
            yield start - began
        finally:
            self._mean_seconds += 0.2 * (time.monotonic() - start - self._mean_seconds)
            self._next()

    async def drain(self, seconds: float) -> bool:
        """Waits for running requests and cancels them after a time. Returns True if none was
        cancelled."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
            return True
        except TimeoutError:
            pass
        self.cancel_all()
        try:
            async with asyncio.timeout(15):
                await self._idle.wait()
        except TimeoutError:
            pass
        return False

    def cancel_all(self) -> None:
        for task in list(self.tasks):
            task.cancel()

    def _next(self) -> None:
        """Gives a free slot to the first request in the queue; no other request can take it
        first."""
        self.running -= 1
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)
                return

    def _busy(self, why: str) -> ApiError:
        wait = math.ceil(
            min(120.0, max(1.0, self._mean_seconds * (self.waiting + 1) / self.max_runs))
        )
        text = f"The server is busy: {why}. Try again in about {wait} s."
        return ApiError(
            429, text, code="queue_full", headers={"Retry-After": str(wait)}, close=True
        )
