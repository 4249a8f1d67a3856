"""Client-side limits: how many calls at once, and how many requests and tokens a minute.

None of it belongs to an event loop: one model may be called from several loops (and threads) at
once, as the synchronous API does, and the limits hold over all of them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable


class Gate:
    """At most `limit` holders at once, first come first served: `async with gate`. None: no
    limit."""

    def __init__(self, limit: int | None):
        self.limit, self.held = limit, 0
        self._waiting: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        loop = asyncio.get_running_loop()
        with self._lock:
            if self.limit is None or (self.held < self.limit and not self._waiting):
                self.held += 1
                return
            turn = loop.create_future()
            self._waiting.append((loop, turn))
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                waiting = (loop, turn) in self._waiting
                if waiting:
                    self._waiting.remove((loop, turn))
            if not waiting:  # the place was handed over in the same moment: pass it on
                self._release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        with self._lock:
            self.held -= 1
            while self._waiting and (self.limit is None or self.held < self.limit):
                loop, turn = self._waiting.popleft()
                try:
                    loop.call_soon_threadsafe(_wake, turn)
                except RuntimeError:  # that loop has ended, and its task with it
                    continue
                self.held += 1  # on behalf of the one that was woken


def _wake(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


class Bucket:
    """Token bucket of `per_minute` units a minute that holds up to `burst` (default: what ten
    seconds bring in).

    A taker goes into debt and waits until the debt is paid back, so takers are served in the order
    they came, and one that takes more than the bucket holds waits longer instead of for ever.
    """

    def __init__(
        self,
        per_minute: float | None,
        burst: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.rate = None if per_minute is None else per_minute / 60
        self.burst = (
            0.0 if self.rate is None else max(1.0, self.rate * 10 if burst is None else burst)
        )
        self._clock, self._level, self._at = clock, self.burst, clock()
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Take `amount` and return the seconds to wait before using it."""
        if self.rate is None:
            return 0.0
        with self._lock:
            self._fill(self.rate)
            self._level -= amount
            return max(0.0, -self._level / self.rate)

    def give_back(self, amount: float) -> None:
        """Return what was not used after all; a negative amount: take more, without waiting."""
        if self.rate is not None:
            with self._lock:
                self._fill(self.rate)
                self._level = min(self.burst, self._level + amount)

    async def wait(self, amount: float) -> None:
        """Take `amount` and sleep until it may be used. A cancelled wait gives it back."""
        seconds = self.take(amount)
        if seconds > 0:
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                self.give_back(amount)
                raise

    def _fill(self, rate: float) -> None:
        now = self._clock()
        self._level = min(self.burst, self._level + (now - self._at) * rate)
        self._at = now


class Pause:
    """A moment before which no call starts: one call's Retry-After holds for all calls to that
    endpoint."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._until = clock, 0.0

    def extend(self, seconds: float) -> None:
        self._until = max(self._until, self._clock() + seconds)

    def remaining(self) -> float:
        return max(0.0, self._until - self._clock())
