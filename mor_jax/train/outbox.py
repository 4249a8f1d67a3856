"""Growing files of a run (metrics, traces), written locally and uploaded if the run directory is in
an object store.

Nothing can be appended to an object. So the loss curve, TensorBoard's events, traces and the
goodput record are written into a local directory (of the run itself, where that is local: then
nothing is copied), and `push` uploads what has changed: before every save, so that a checkpoint
never knows of a step that the curve does not, and now and then between.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from mor_jax.paths import is_local, reason

EVERY = 30.0  # seconds between two uploads in the background


class Outbox:
    """A local directory for the growing files of a run directory.

    Attributes:
      directory: where to write.

    Args:
      workdir: the run directory.
      fetch: names of files to go on with; brought here if they exist.
    Raises:
      OSError: they cannot be read.
    """

    def __init__(self, workdir: epath.Path, fetch: Iterable[str] = ()):
        self._workdir = None if is_local(workdir) else workdir
        self.directory = (
            Path(workdir)
            if self._workdir is None
            else Path(tempfile.mkdtemp(prefix="mor_jax_run_"))
        )
        self._sent: dict[Path, tuple[int, int]] = {}
        self._pushed = time.monotonic()
        self._thread: threading.Thread | None = None
        if self._workdir is None:
            return
        for name in fetch:
            with contextlib.suppress(FileNotFoundError):
                (self.directory / name).write_bytes((self._workdir / name).read_bytes())

    def push(self) -> None:
        """Upload what has changed, and return when it is there. Raises OSError."""
        self._join()
        self._push()

    def push_sometimes(self) -> None:
        """Call often: every EVERY seconds an upload begins in the background; its errors are left
        to `push`."""
        if self._workdir is None or time.monotonic() - self._pushed < EVERY or self._busy():
            return
        self._thread = threading.Thread(target=self._quietly, name="outbox", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Upload the rest, and remove the local copies. Raises OSError; the copies are kept
        then."""
        if self._workdir is not None:
            self.push()
            shutil.rmtree(self.directory, ignore_errors=True)

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _quietly(self) -> None:
        with contextlib.suppress(Exception):
            self._push()

    def _push(self) -> None:
        self._pushed = time.monotonic()
        if self._workdir is None:
            return
        for path in sorted(
            p for p in self.directory.rglob("*") if p.is_file() and p.suffix != ".tmp"
        ):
            stat = os.stat(path)
            version = (stat.st_size, stat.st_mtime_ns)
            if self._sent.get(path) != version:
                try:
                    (self._workdir / path.relative_to(self.directory).as_posix()).write_bytes(
                        path.read_bytes()
                    )
                except OSError:
                    raise
                except Exception as e:  # each client has its own kinds
                    raise OSError(reason(e)) from e
                self._sent[path] = version
