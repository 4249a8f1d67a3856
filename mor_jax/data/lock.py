"""One writer at a time in a cache directory, across processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: the atomic renames still keep a cache whole, work may be done twice
    fcntl = None  # type: ignore[assignment]  # read as such below


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path`; calls `on_wait` once if another process has it.

    The kernel releases the lock when its process ends, however it ends; the file itself stays,
    since removing it would let two processes lock two different files of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        if fcntl is not None:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(f, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks, as above
        yield
