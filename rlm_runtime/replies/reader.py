"""Reading hostile text beside the event loop.

Readers of what a cell, a model or an endpoint sent have budgets of steps, linear in its length. A
long text may still take a second, so it is read on a thread of its own: no single step of a reader
holds the interpreter for long, and the loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

SLICE_SECONDS = 0.01  # of the event loop that many small things get in one go
INLINE = 4_000  # characters read at once, on the loop's own thread: some 50 ms at worst
THREADS = 2  # more would only take turns with each other, and with the loop

P = ParamSpec("P")
T = TypeVar("T")
_threads: ThreadPoolExecutor | None = None


async def read(size: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(*args, **kwargs)`, on a reader's thread where what it reads has more than INLINE
    characters."""
    return await beside(work, *args, **kwargs) if size > INLINE else work(*args, **kwargs)


async def beside(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(*args, **kwargs)` on a reader's thread."""
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(THREADS, thread_name_prefix="rlm-reader")
    try:
        future = asyncio.get_running_loop().run_in_executor(_threads, lambda: work(*args, **kwargs))
    except RuntimeError:  # no thread can be had
        return work(*args, **kwargs)
    return await future


def size_of(value: object, enough: int = INLINE + 1) -> int:
    """About how many characters a JSON value has, or a model's fields, counted up to `enough`."""
    size = 0
    stack: list[Any] = [value]
    while stack and size < enough:
        item = stack.pop()
        kind = type(item)
        if kind is str:
            size += len(item)
        elif kind is list or kind is tuple:
            size += 4
            stack += item[:enough]
        elif kind is dict:
            size += 4 + 4 * len(item)
            stack += list(item)[:enough] + list(item.values())[:enough]
        else:
            size += 4
            if item is not None and kind is not int and isinstance(item, BaseModel):
                stack += item.__dict__.values()
    return size


class Pace:
    """Bounds what many small steps that never wait take of the event loop in one round."""

    def __init__(self) -> None:
        self._until = 0.0
        self._renewing = False

    async def step(self) -> None:
        """Let others, a cancel above all, come in where this round's time is over."""
        if time.monotonic() > self._until:
            if not self._renewing:
                self._renewing = True
                asyncio.get_running_loop().call_soon(self._renew)
            await asyncio.sleep(0)

    def _renew(self) -> None:
        self._until, self._renewing = time.monotonic() + SLICE_SECONDS, False
