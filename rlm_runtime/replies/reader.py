"""Reading hostile text beside the event loop.

Readers of what a cell, a model or an endpoint sent have budgets of steps, linear in its length. A long text may still
take a second, so it is read on a thread of its own: no single step of a reader holds the interpreter for long, and the
loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

INLINE = 4_000  # characters read at once, on the loop's own thread: some 50 ms at worst
THREADS = 2  # more would only take turns with each other, and with the loop

P = ParamSpec("P")
T = TypeVar("T")
_threads: ThreadPoolExecutor | None = None


async def read(size: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(*args, **kwargs)`, on a reader's thread where what it reads has more than INLINE characters."""
    if size <= INLINE:
        return work(*args, **kwargs)
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(THREADS, thread_name_prefix="rlm-reader")
    return await asyncio.get_running_loop().run_in_executor(_threads, lambda: work(*args, **kwargs))


def size_of(value: object, enough: int = INLINE + 1) -> int:
    """About how many characters a JSON value has, counted up to `enough`."""
    size, stack = 0, [value]
    while stack and size < enough:
        item = stack.pop()
        size += len(item) if isinstance(item, str) else 4
        if isinstance(item, dict):
            size += 4 * len(item)
            stack += list(item)[:enough] + list(item.values())[:enough]
        elif isinstance(item, list | tuple):
            stack += item[:enough]
    return size
