"""Progress of long work: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

EVERY = 10.0  # seconds between lines
MEGABYTE = 1e6


@contextlib.contextmanager
def progress(
    what: str, total: float | None, unit: str = "MB", *, shown: bool = True
) -> Iterator[Callable[[float], None]]:
    """Yields `advance(amount)`. `total` may be None where it is not known; unit "MB" takes amounts
    in bytes.

    Writes to stderr: stdout belongs to the command's result."""
    if not shown:
        yield lambda amount: None
        return
    scale = MEGABYTE if unit == "MB" else 1
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(what, total, unit, scale)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(
            "{task.completed:,.0f}"
            + ("/{task.total:,.0f}" if total is not None else "")
            + f" {unit}"
        ),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None if total is None else total / scale)
        yield lambda amount: bar.advance(task, amount / scale)


@contextlib.contextmanager
def still(what: str, tell: Callable[[str], None], *, first: float = 3.0) -> Iterator[None]:
    """Long work without progress of its own: `tell` gets "what ..." after `first` seconds, then its
    time now and then."""
    done, began = threading.Event(), time.monotonic()

    def talk() -> None:
        wait = first
        while not done.wait(wait):
            tell(f"{what} ... {time.monotonic() - began:.0f} s")
            wait = max(2 * first, min(4 * wait, 60.0))

    thread = threading.Thread(target=talk, name="still", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Lines:
    """One line at the start of long work, then every EVERY seconds."""

    def __init__(self, what: str, total: float | None, unit: str, scale: float):
        self._what, self._unit, self._scale = what, unit, scale
        self._of = "" if total is None else f" of {total / scale:,.0f}"
        self._done = 0.0
        self._last = time.monotonic()
        say(f"{what} ...")

    def __call__(self, amount: float) -> None:
        self._done += amount
        if time.monotonic() - self._last >= EVERY:
            self._last = time.monotonic()
            say(f"{self._what}: {self._done / self._scale:,.0f}{self._of} {self._unit}")


def say(line: str, *, shown: bool = True) -> None:
    if shown:
        print(line, file=sys.stderr, flush=True)
