"""Where attacks are run: one REPL, a host full of things worth stealing or breaking, and a look at
all of them after.

An attack is one or more cells. A *probe* is an attack that knows itself whether it got through: its
body ends with `return what_it_got`, and anything but an error or an empty value is a breach. Probes
that succeed without a sandbox (`bites`) are run in the unconfined environment too, so that none of
them is refused for a typing error.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from rlm_runtime.context import Context
from rlm_runtime.repl import make
from rlm_runtime.repl.base import CellResult, Limits, Outcome, Request

REPOSITORY = Path(__file__).resolve().parents[3]
ROOT = os.geteuid() == 0
X86 = platform.machine() == "x86_64"
HANG = 60.0  # seconds after which anything counts as hanging
GROWTH = 150 << 20  # bytes by which the host may grow over a whole arena
MISTAKES = (
    "NameError",
    "AttributeError",
    "SyntaxError",
    "ImportError",
    "ModuleNotFoundError",
    "TypeError",
    "KeyError",
)
TIMED = {"cell_seconds": 0.4, "grace_seconds": 0.3}
SMALL = {"memory": 256 << 20, "scratch": 8 << 20, "cell_seconds": 4.0, "grace_seconds": 0.4}

PRELUDE = """
import ctypes, os, sys, errno, struct, time
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
def sc(number, *args):
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = _libc.syscall(ctypes.c_long(number), *wide)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "call %d gave %d" % (number, result)
"""
PROBE = """
def attempt():
{body}
try:
    got = attempt()
    print("BREACH", repr(got)[:300] if got else "", flush=True) if got else print("NOTHING")
except BaseException as problem:
    print("REFUSED", type(problem).__name__, problem)
"""
# Finds the private channel as a hostile cell would, and speaks to it past the runtime.
CHANNEL = """
import gc, stat
def sockets():
    found = []
    for fd in range(3, 1024):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                found.append(fd)
        except OSError:
            pass
    return found
def calls_object():
    return [o for o in gc.get_objects() if type(o).__name__ == "Calls"][0]
def cell_id():
    return calls_object()._cell
_libc.send.restype = ctypes.c_ssize_t
_channel = sockets()[:1]  # once: looking for it takes as long as sending a megabyte
def raw(data):
    data = memoryview(bytes(data))
    fd = _channel[0]
    while data:
        sent = _libc.send(fd, bytes(data[:1 << 16]), len(data[:1 << 16]), 0)
        if sent < 0:
            raise OSError(ctypes.get_errno(), "send")
        data = data[sent:]
"""


@dataclass(frozen=True)
class Attack:
    name: str
    cells: tuple[str, ...]
    # statuses the last cell may have
    ends: tuple[str, ...] = ("ok", "error", "timeout", "killed", "crashed")
    said: tuple[str, ...] = ()  # must be in what the last cell printed
    not_said: tuple[str, ...] = ("BREACH",)
    bites: bool = False
    # leaves a thread that may take the message by which the host starts the next cell
    steals_message: bool = False


def attack(name: str, *cells: str, ends: str = "", said: str = "") -> Attack:
    listed = tuple(ends.split()) or Attack.__dataclass_fields__["ends"].default
    texts = tuple(PRELUDE + textwrap.dedent(cell) for cell in cells)
    return Attack(name, texts, listed, (said,) if said else ())


def probe(name: str, body: str, bites: bool = True) -> Attack:
    cell = PRELUDE + PROBE.format(body=textwrap.indent(textwrap.dedent(body).strip(), "    "))
    return Attack(name, (cell,), ("ok",), ("REFUSED",), ("BREACH",), bites)


def names(attacks: list[Attack]) -> list[str]:
    assert len({a.name for a in attacks}) == len(attacks)
    return [a.name for a in attacks]


@dataclass
class Host:
    """Things outside of the sandbox that a cell must not reach."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rlm-attacks-")))
    token: str = field(default_factory=lambda: "sk-" + secrets.token_hex(12))

    def __enter__(self):
        (self.folder / "secret.txt").write_text(self.token)
        (self.folder / "module_of_the_host.py").write_text(f"TOKEN = {self.token!r}\n")
        self.victim = subprocess.Popen(
            ["sleep", "600"], env={"KEY": self.token, "PATH": os.environ["PATH"]}
        )
        self.before = self._state()
        os.environ["RLM_ATTACKS_API_KEY"] = self.token
        self.open_file = os.open(self.folder / "secret.txt", os.O_RDWR)
        os.set_inheritable(self.open_file, True)
        self.listeners, self.contacted, self._stop = [], [], False
        for family, where in (
            (socket.AF_INET, ("127.0.0.1", 0)),
            (socket.AF_UNIX, str(self.folder / "socket")),
            (socket.AF_UNIX, f"\0rlm-attacks-{self.token}"),
        ):
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.bind(where)
            listener.listen()
            self.listeners.append(listener)
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.udp.setblocking(False)
        return self

    def _state(self):
        stat = Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()
        files = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        return {
            "parent group session": stat[1:4],
            "nice": stat[16],
            "scheduler": os.sched_getscheduler(self.victim.pid),
            "processors": os.sched_getaffinity(self.victim.pid),
            "files": files,
        }

    def unharmed(self) -> None:
        """Raises AssertionError."""
        assert self.victim.poll() is None, "the victim was ended"
        state = Path(f"/proc/{self.victim.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state in "SRD", f"the victim was stopped or traced ({state})"
        assert self._state() == self.before
        for listener in self.listeners:
            listener.setblocking(False)
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                continue
            raise AssertionError("a cell connected to a socket of the host")
        try:
            raise AssertionError(f"a cell sent {self.udp.recv(100)!r} to the host")
        except BlockingIOError:
            pass
        assert not (Path("/tmp") / f"written-{self.token}").exists()
        assert not (Path.home() / f"written-{self.token}").exists()

    def fill_in(self, cell: str) -> str:
        for name, value in {
            "HOST": os.getpid(),
            "VICTIM": self.victim.pid,
            "GUARD": self.folder,
            "REPO": REPOSITORY,
            "HOME": Path.home(),
            "TOKEN": self.token,
            "PORT": self.listeners[0].getsockname()[1],
            "UDP": self.udp.getsockname()[1],
        }.items():
            cell = cell.replace(f"@{name}@", str(value))
        return cell

    def __exit__(self, *_):
        self.victim.kill()
        self.victim.wait()
        for listener in (*self.listeners, self.udp):
            listener.close()
        os.close(self.open_file)
        os.environ.pop("RLM_ATTACKS_API_KEY", None)
        shutil.rmtree(self.folder)


class Arena:
    """A REPL in an event loop of its own, a host around it. Use as a context manager."""

    def __init__(self, kind: str = "local", context="some text", **limits):
        self.host, self.kind, self.limits = (
            Host(),
            kind,
            Limits(**({"cell_seconds": 10.0, "grace_seconds": 0.5} | limits)),
        )
        self.calls: list[Request] = []
        self.context, self.gap = context, 0.0
        self.handler = self.echo

    async def echo(self, request: Request) -> list[Outcome]:
        self.calls.append(request)
        return [Outcome(value=prompt) for prompt in request.prompts or (None,)]

    def __enter__(self):
        gc.collect()
        self._before = footprint()
        self.host.__enter__()
        self.runner = asyncio.Runner()
        try:
            self.environment = make(self.kind, self.limits)
            self.report = self.runner.run(self.environment.start(Context.of(self.context)))
            self.rss = rss()
        except BaseException:
            self.runner.close()
            self.host.__exit__()
            raise
        return self

    def __exit__(self, kind, error, trace):
        self.runner.run(self.environment.aclose())
        self.runner.close()
        self.host.__exit__()
        if error is None:
            gc.collect()
            after = footprint()
            assert after == self._before, f"left behind: {self._before} before, {after} after"

    # -- cells

    def run(self, cell: str) -> CellResult:
        """One cell, while the host's event loop is watched for stalls."""
        return self.runner.run(self._run(self.host.fill_in(cell)))

    async def _run(self, cell: str) -> CellResult:
        ticking = asyncio.ensure_future(self._tick())
        try:
            return await asyncio.wait_for(self.environment.run(cell, self.handler), HANG)
        finally:
            ticking.cancel()

    async def _tick(self) -> None:
        self.gap, last = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            self.gap, last = max(self.gap, now - last), now

    def play(self, what: Attack) -> list[CellResult]:
        """All that has to hold of every attack: it ends as it may, the next cell answers, the host
        is as it was."""
        before = descriptors(), len(children()), len(threading.enumerate())
        results = [self.run(cell) for cell in what.cells]
        last = results[-1]
        assert last.status in what.ends, last
        everything = "".join(
            r.stdout + r.stderr + (r.error.message if r.error else "") for r in results
        )
        for text in what.said:
            assert text in everything, last
        for text in what.not_said:
            assert text not in everything, last
        if "REFUSED" in what.said:
            kind = last.stdout.split("REFUSED", 1)[1].split()[0]
            assert kind not in MISTAKES, f"the probe itself is wrong: {last.stdout}"
        for result in results:
            self.bounded(result)
        self.alive(message_stolen=what.steals_message)
        self.unharmed(*before)
        return results

    def bounded(self, result: CellResult) -> None:
        room = self.limits.output_chars + 2_000
        assert len(result.stdout) <= room and len(result.stderr) <= 2 * room
        assert len(result.variables) <= 250
        if result.error is not None:
            assert len(result.error.message) <= 5_000 and len(result.error.traceback) <= 12_000

    def alive(self, message_stolen: bool = False) -> None:
        """The run goes on: the next cell computes, and its call is answered.

        With `message_stolen`, a thread of the attack may take one message that was meant for the
        worker. Then one cell may lose its reply or never start; the cell after it is answered.
        """
        cell, timed = "print(6 * 7)\nprint(llm_query('ping'))", self.environment.limits
        before = len(self.calls)
        result = self.run(cell) if message_stolen else None
        assert result is None or result.status in ("ok", "timeout", "killed"), result
        if result is None or result.status != "ok":
            before = len(self.calls)
            # Threads of the attack may still take turns with it, and so may a busy machine: it has
            # to come to an end.
            self.environment.limits = timed.model_copy(update={"cell_seconds": 20.0})
            result = self.run(cell)
            self.environment.limits = timed
        assert result.status == "ok", result
        assert result.stdout.endswith("42\nping\n"), result
        assert [c.prompts for c in self.calls[before:] if c.prompts == ("ping",)] == [("ping",)]

    def unharmed(self, files: int, processes: int, threads: int) -> None:
        """The host holds no more than before the attack, and everything around it is as it was."""
        self.host.unharmed()
        assert rss() - self.rss < GROWTH, f"the host grew by {(rss() - self.rss) >> 20} MiB"
        assert descriptors() == files
        assert len(children()) <= processes, f"processes: {children()}"
        assert len(threading.enumerate()) <= threads + 5  # the loop's own pool


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Open ones, without those of a thread that looks into a work folder, or empties one, at the
    moment."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += "/rlm-repl-" not in os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the listing's own
    return count


def children() -> set[int]:
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            found |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
    return {int(pid) for pid in found}


def folders() -> list[str]:
    return sorted(
        n
        for n in os.listdir(tempfile.gettempdir())
        if n.startswith("rlm-repl-") and f"-{os.getpid()}-" in n
    )


def footprint():
    """What this process holds: processes, descriptors, work folders."""
    return children(), descriptors(), folders()
