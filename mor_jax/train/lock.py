"""One process at a time in a run directory: a lock that says who has it.

`run.lock` in the run directory is a small JSON document: host, pid, when the process began, and a
number that it raises every BEAT seconds. A lock whose number has not changed for EXPIRES seconds
has no holder any more and is taken over; so it is a lease, which works on object stores and shared
file systems and compares no clocks of two machines. Where the file system has `flock` that is held
too: it is exact, and ends with the process. A pid of this host that is gone also says so at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from etils import epath

from mor_jax.errors import UserError
from mor_jax.paths import filesystem, is_local, reason, write_bytes

try:
    import fcntl
except ImportError:  # Windows: the lease alone
    fcntl = None  # type: ignore[assignment]  # read as such below

FILE = "run.lock"
BEAT = 10.0  # seconds between two signs of life
EXPIRES = 4.5  # beats without one after which the holder counts as gone
# beats after which a lease taken over is looked at again, since two may have taken it at once
SETTLE = 0.1
# beats, on object stores: a rival that read the old lock may be a request behind
REMOTE_SETTLE = 0.5
ENV = "MOR_JAX_LOCK_SECONDS"  # instead of BEAT
WIDTH = 512  # bytes of the document
SCHEDULERS = ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST")
# seconds a scheduled job waits by default: it may be started again before its last start has ended
WAIT = 600.0


class InUse(UserError):
    """Another process works in the run directory."""


class _Holder(NamedTuple):
    """What the lock file says. `certain`: the file system says that its process lives."""

    content: bytes
    certain: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        try:
            value = json.loads(self.content)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    def __str__(self) -> str:
        return "host {}, pid {}, since {}".format(
            *(self.fields.get(k, "unknown") for k in ("host", "pid", "since"))
        )


class RunLock:
    """The lock of one run directory; see `hold`."""

    def __init__(self, workdir: epath.Path, wait: float = 0.0, say: Callable[[str], None] = print):
        self._workdir, self._path, self._wait, self._say = workdir, workdir / FILE, wait, say
        self._period = float(os.environ.get(ENV) or BEAT)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self._mine: dict[str, Any] = {
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "since": since,
        }
        self._mine |= {"id": uuid.uuid4().hex, "beat": 0}
        self._found = b""  # what a holder that is gone had left
        self._file: IO[bytes] | None = None  # keeps the flock
        self._leases = 0  # that have passed since the lock file changed
        self._lost = ""
        self._made = False  # the directory
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Raises InUse naming the holder, or UserError where the directory cannot be written."""
        try:
            self._acquire()
        except OSError as e:
            raise UserError(
                f"cannot write to the run directory {self._workdir}: {reason(e)}."
            ) from e
        self._thread.start()

    def check(self) -> None:
        """Raise InUse if another process has taken over, because this one gave no sign of life."""
        if self._lost:
            raise InUse(self._lost)

    def release(self, *, put_back: bool = False) -> None:
        """Releases the lock. put_back: restore the lock file of the holder before, because this
        process did nothing."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(Exception):  # an unreachable store: the lease will expire
            if not self._lost and self._read() is not None:
                self._write(self._found) if put_back and self._found else self._remove()
        if self._file is not None:
            self._file.close()
        if put_back and self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self._workdir)  # where nothing was written

    def _acquire(self) -> None:
        last, since, lives, told = b"", time.monotonic(), False, False
        give_up = since + self._wait
        while True:
            self._leases = int((time.monotonic() - since) / (EXPIRES * self._period))
            expired = self._leases > 0
            holder = self._try(dead=last if expired else b"")
            if holder is None:
                return
            if holder.content != last:
                lives = bool(last)  # it has changed while we looked
                last, since = holder.content, time.monotonic()
            if (holder.certain or lives) and time.monotonic() >= give_up:
                raise InUse(
                    f"{self._workdir} is in use by another process ({holder}). Two in one run directory would spoil each "
                    "other's records: stop that one, wait for it with --wait=SECONDS, or give another --workdir."
                )
            if not told:
                told = True
                doing = (
                    "waiting for it" if holder.certain else "waiting to see whether it still runs"
                )
                self._say(f"{self._workdir} is in use by another process ({holder}); {doing} ...")
            time.sleep(min(1.0, self._period / 4))

    def _try(self, dead: bytes) -> _Holder | None:
        """Take the lock if nobody has it, or a holder known to be gone: by itself, or because what
        it wrote is `dead`.

        None: it is ours."""
        take = self._try_file if is_local(self._path) else self._try_object
        holder = take(dead)
        if holder is None and self._file is None and (self._found or is_local(self._path)):
            time.sleep((SETTLE if is_local(self._path) else REMOTE_SETTLE) * self._period)
            content = self._read() or b""
            if _Holder(content).fields.get("id") != self._mine["id"]:
                return _Holder(content)
        return holder

    def _try_file(self, dead: bytes) -> _Holder | None:
        if not self._workdir.exists():
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._made = True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115 - kept open, which keeps the flock
        try:
            locked = _flock(file)
            file.seek(0)
            content = file.read()
            if locked is False:
                return _Holder(content, certain=True)
            if not os.path.exists(self._path) or not os.path.samestat(
                os.fstat(file.fileno()), os.stat(self._path)
            ):
                # let go of, and removed, between our opening and locking it: look again
                return _Holder(content)
            if content and content != dead and not self._gone(content, unlocked=bool(locked)):
                return _Holder(content)
            self._found = self._found or content
            if locked:
                self._file, file = file, None
            self._write(self._document())
            return None
        finally:
            if file is not None:
                file.close()

    def _try_object(self, dead: bytes) -> _Holder | None:
        store = filesystem(self._path)
        for _ in range(2):
            try:
                # Conditional on its absence, which epath has no way to say.
                store.pipe_file(os.fspath(self._path), self._document(), mode="create")
                return None
            except FileExistsError:
                content = self._read() or b""
                if content and content != dead and not self._gone(content):
                    return _Holder(content)
                if content:
                    # Of those that found it dead, whoever claims it first replaces it. Claims stay:
                    # one that looked long ago must not come back to a lock that has changed hands.
                    # A claimer that died itself is passed over after another lease.
                    claim = f"{os.fspath(self._path)}.taken-{hashlib.sha256(content).hexdigest()[:16]}-{self._leases}"
                    try:
                        store.pipe_file(claim, self._document(), mode="create")
                    except FileExistsError:
                        return _Holder(content)
                    self._found = self._found or content
                    store.pipe_file(os.fspath(self._path), self._document())
                    return None
            except OSError:
                raise
            except Exception as e:  # each client has its own kinds
                raise OSError(reason(e)) from e
        return _Holder(self._read() or b"")

    def _gone(self, content: bytes, *, unlocked: bool = False) -> bool:
        """Whether the process that wrote this is known to have ended. unlocked: it holds no flock
        any more."""
        holder = _Holder(content).fields
        if not holder.get("id") or holder["id"] == self._mine["id"]:
            return True
        if holder.get("host") != self._mine["host"]:
            return False
        return unlocked or (
            holder.get("namespace") == self._mine["namespace"] and not _runs(int(holder["pid"]))
        )

    def _keep(self) -> None:
        """Updates the lock file regularly, and checks that this process still holds the lock."""
        while not self._closing.wait(self._period):
            try:
                now = _Holder(self._read() or b"")
            except Exception:  # a store that does not answer for a moment
                continue
            if now.fields.get("id") != self._mine["id"]:
                what = f"was taken by another process ({now})" if now.content else "was removed"
                self._lost = f"the lock {self._path} {what}. This process stops and writes nothing more there."
                return
            self._mine["beat"] += 1
            with contextlib.suppress(Exception):
                self._write(self._document())

    def _read(self) -> bytes | None:
        try:
            if is_local(self._path):
                return self._path.read_bytes()
            # In one request: opening an object asks what it is first, and reading what has changed
            # since is an error.
            return filesystem(self._path).cat_file(os.fspath(self._path))
        except FileNotFoundError:
            return None

    def _write(self, content: bytes) -> None:
        if self._file is None:
            write_bytes(self._path, content)
            return
        # In place, since another file would not be locked; of one size and at once, so that nobody
        # reads half of it.
        self._file.seek(0)
        self._file.write(content)
        self._file.truncate(len(content))

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if is_local(self._path):
                self._path.unlink()
            else:
                filesystem(self._path).rm_file(os.fspath(self._path))

    def _document(self) -> bytes:
        return json.dumps(self._mine).encode().ljust(WIDTH)


@contextlib.contextmanager
def hold(
    workdir: epath.Path,
    *,
    wait: float | None = None,
    active: bool = True,
    say: Callable[[str], None] = print,
) -> Iterator[RunLock | None]:
    """Holds the lock of the run directory inside this context. The directory is made if it is
    missing.

    Args:
      wait: seconds to wait for another process that lives; None: WAIT under a scheduler, else none.
      active: False on all processes of a job but one; then nothing is done.
      say: takes a line about waiting.
    Raises:
      InUse: another process has it; the message names its host, pid and time.
      UserError: the directory cannot be written.
    """
    if not active:
        yield None
        return
    if wait is None:
        wait = WAIT if any(name in os.environ for name in SCHEDULERS) else 0.0
    lock = RunLock(workdir, wait, say)
    lock.acquire()
    refused = False
    try:
        yield lock
    except UserError:
        refused = True
        raise
    finally:
        lock.release(put_back=refused)


def _flock(file: IO[bytes]) -> bool | None:
    """True: locked here; False: by another process; None: this file system has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _namespace() -> str:
    """Of pids: containers may share a host's name and not its pids."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
