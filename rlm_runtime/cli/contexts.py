"""What `--context` names, and what is piped in."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rlm_runtime.errors import ContextError, UsageError


@contextlib.contextmanager
def opened(paths: list[str] | None) -> Iterator[list[Path]]:
    """The files and folders of a run; standard input becomes a private file while this lasts.

    Raises UsageError, ContextError.
    """
    if not paths:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError(
                "Nothing to read: name a file or a folder with --context, or pipe a text in."
            )
        paths = ["-"]
    if paths.count("-") > 1:
        raise UsageError("--context -: standard input can be read only once.")
    with tempfile.TemporaryDirectory(prefix="rlm-stdin-") as scratch:
        yield [_stdin(Path(scratch)) if p == "-" else Path(p) for p in paths]


def is_piped(paths: list[str] | None) -> bool:
    """Whether the context is standard input alone."""
    return not paths or paths == ["-"]


def _stdin(home: Path) -> Path:
    """Standard input in a file, so that any size can be read as lazily as a file."""
    path = home / "stdin.txt"
    with open(path, "wb") as target:
        shutil.copyfileobj(sys.stdin.buffer, target, 1 << 20)
    if not path.stat().st_size:
        raise ContextError(
            "Standard input is empty: pipe a text in, or name a file with --context."
        )
    return path
