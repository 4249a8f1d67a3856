"""The host's side of a worker: how it is started, takes contexts and is replaced, and its frames.

How the process is made is left to the environments (`local`, `bubblewrap`, `docker`).
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any, TypeVar

from rlm_runtime.context import Context, Payload
from rlm_runtime.errors import ContextError, SandboxError
from rlm_runtime.repl import packages as package_list
from rlm_runtime.repl import sandbox, wire
from rlm_runtime.repl.base import (
    Limits,
    SandboxReport,
    ToolInfo,
)
from rlm_runtime.repl.cell import Cell, CellEnd
from rlm_runtime.repl.process import Launch, Process
from rlm_runtime.repl.resources import Resources
from rlm_runtime.repl.sandbox import SandboxPolicy
from rlm_runtime.repl.workdir import MIRROR, WorkDir, remove, sweep

T = TypeVar("T")

WORKER = Path(__file__).parent / "worker"
# a worker may send before it is ended; so many bytes count for one more
BAD_FRAMES, BAD_BYTES = 200, 1 << 20
STALE_FRAMES, STALE_BYTES = 100_000, 1 << 11  # of earlier cells, or of none
# for the work folder, where the context contains the usual place
OTHER_TEMP = ("/var/tmp", "/tmp", "/dev/shm")
THREAD_ENDS = 20  # hundredths of a second for a thread that has been joined to be gone
START_TRIES = 3  # of a worker that is killed while it starts


class _Killed(SandboxError):
    """A worker was killed by a signal while it started: by chance or by somebody, so another try is
    worth it."""


class _NotLoaded(Exception):
    """A worker in which cells have run did not take a context: its fault, until a fresh one says
    the same."""


class Nuisance:
    """Frames that are none, and frames nobody waits for, since the worker was last let go on."""

    def __init__(self) -> None:
        self.bad = self.stale = 0

    def too_much(self) -> str | None:
        if self.bad > BAD_FRAMES:
            return "it sent what is no message over the runtime's own channel, again and again"
        return "it flooded the runtime's own channel" if self.stale > STALE_FRAMES else None


class HostedWorker:
    """A worker as its host sees it: start, contexts, frames, replacement."""

    kind = "local"
    required: tuple[str, ...] = tuple(sandbox.LAYERS)

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        policy: SandboxPolicy = SandboxPolicy(),  # noqa: B008
        packages: tuple[str, ...] = (),
        *,
        temp_dir: str | None = None,
    ):
        """`packages`: installed distributions the cells may import. Raises UsageError for one that
        is not installed."""
        self.limits, self.policy = limits, policy
        self.report: SandboxReport | None = None
        self._packages = package_list.resolve(packages)
        self._temp_dir = temp_dir
        self._lock = asyncio.Lock()
        self._resources = Resources()
        self._finalizer = weakref.finalize(self, self._resources.drop)
        self._process: Process | None = None
        self._started = self._closed = False
        self._closing: asyncio.Future[None] | None = None
        self._tools: tuple[ToolInfo, ...] = ()
        self._contexts: dict[str, Context] = {}
        self._payloads: dict[str, Payload] = {}
        self._bound: dict[str, Any] = {}
        self._to_bind: dict[str, Any] = {}
        self._reset_answer = False
        self._cells = 0  # run so far, over all workers
        self._raw: dict[str, str] = {}
        self._lost: str | None = None  # a loss the model has not been told of
        self._used = False  # a cell has run in this worker
        self._threads = 0  # of a worker at rest
        self._cell: Cell | None = None
        self._writing: asyncio.Future[Payload] | None = None  # of a context, in a thread
        self._cleaning: asyncio.Future[None] | None = None  # an old work folder is being removed
        self._nuisance = Nuisance()
        # (id, future) of a load under way: an error, or None
        self._reply: tuple[str, asyncio.Future[str | None]] | None = None
        self._ready: asyncio.Future[tuple[dict[str, str], str | None]] | None = None

    @property
    def _worker(self) -> Process:
        assert self._process is not None, "a worker has been started"
        return self._process

    @property
    def _folder(self) -> WorkDir:
        assert self._resources.folder is not None, "made before the first worker"
        return self._resources.folder

    # -- what an environment of its own kind says

    def _launch(self, folder: WorkDir) -> Launch:
        raise TypeError(f"{type(self).__name__} does not say how to start a worker.")

    def _view(self, folder: WorkDir) -> dict[str, str]:
        """Paths as the worker sees them."""
        return {
            "scratch": str(folder.scratch),
            "inbox": str(folder.inbox),
            "canary": str(folder.canary),
            "said": str(folder.said),
        }

    def _inside(self, path: Path) -> str:
        """A path of the host as the worker sees it."""
        return str(path)

    def _environment(self, launch: Launch, view: dict[str, str]) -> list[str]:
        """Names of the variables the worker may have."""
        return list(launch.env)

    def _packages_inside(self) -> dict[str, list[str]]:
        return self._packages.message()

    confine = True
    # the worker's environment is not ours to choose: it removes what nobody asked for itself
    scrub = False
    # contexts are written while the process starts; False where they must be there before
    overlap = True
    parent: int | None = None  # the process whose end is the worker's

    def _kill_command(self) -> list[str] | None:
        """What ends the worker where killing our own child is not enough."""
        return None

    def _outer_layers(self, process: Process) -> dict[str, str]:
        """Layers around the worker, as the host finds them."""
        return {}

    def _explain(self, stderr: str) -> str:
        """What a worker that did not start wrote, and what to do about it."""
        return f"It wrote: {stderr.strip()[-2000:]}" if stderr.strip() else "It wrote nothing."

    # -- start

    async def _start_worker(self) -> None:
        """A fresh worker with everything bound."""
        for left in reversed(range(START_TRIES)):
            try:
                return await self._start_once()
            except _Killed as error:
                await self._drop_worker()
                if not left:
                    raise SandboxError(str(error)) from None

    async def _start_once(self) -> None:
        if self._closed:
            raise SandboxError("The REPL has been closed.")
        if os.name != "posix" or not hasattr(os, "pidfd_open"):
            raise SandboxError(f"environment={self.kind!r} needs Linux 5.3 or newer.")
        mine = self._resources
        try:
            if mine.folder is None:
                mine.folder = await self._make_folder()
            else:
                try:
                    mine.folder.renew()
                except OSError:  # no room, perhaps, as long as the last worker's files are there
                    await self._cleaned()
                    mine.folder.renew()
        except OSError as error:
            raise SandboxError(f"The REPL's work folder cannot be made: {error}") from None
        mine.hold_spawner()
        payloads = asyncio.ensure_future(self._make_payloads(mine.folder))
        if not self.overlap:
            await payloads
        launch = self._launch(mine.folder)
        try:
            await self._connect(launch, payloads)
        finally:
            payloads.cancel()
            await asyncio.wait([payloads])  # its error was raised by what waited for it
        self._used = False
        for name in self._contexts:
            await self._load(name)
        self._threads = self._worker.threads()
        self._to_bind, self._reset_answer = dict(self._bound), False
        self._raw = {}

    async def _make_folder(self) -> WorkDir:
        """The work folder, outside of every folder the worker may read. Raises OSError,
        ContextError."""
        first = self._temp_dir or tempfile.gettempdir()
        for parent in (first,) if self._temp_dir else (first, *OTHER_TEMP):
            if any(contains(context, parent) for context in self._contexts.values()):
                continue
            try:
                await asyncio.to_thread(sweep, parent)
                return WorkDir(parent)
            except OSError:
                if parent == first:
                    raise
        raise around(next(c for c in self._contexts.values() if contains(c, first)), first)

    async def _connect(self, launch: Launch, payloads: asyncio.Future[None]) -> None:
        """Start the process, greet it, wait until it has locked itself in, and look whether it
        has."""
        loop, limits = asyncio.get_running_loop(), self.limits
        try:
            process = await Process.start(
                launch, frame=limits.frame, raw=max(limits.output_chars, 1000)
            )
        except OSError as error:
            raise SandboxError(
                f"The REPL's worker cannot be started: {error}. {self._explain('')}"
            ) from None
        self._process = self._resources.process = process
        self._resources.command = self._kill_command()
        self._ready, self._nuisance = loop.create_future(), Nuisance()
        me = weakref.ref(self)  # a forgotten environment is collected, and its worker with it

        def on_frame(message: dict[str, Any] | None, size: int) -> None:
            if (env := me()) is not None:
                env._on_frame(process, message, size)

        def on_end() -> None:
            if (env := me()) is not None:
                env._on_end(process)

        process.on_frame, process.on_end = on_frame, on_end
        process.gate = lambda: (env := me()) is None or env._has_room()
        try:
            await payloads
            process.resume_reading()
            process.send(self._hello(self._folder, launch))
            either: set[asyncio.Future[Any]] = {self._ready, process.ended}
            done, _ = await asyncio.wait(
                either,
                timeout=limits.start_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if self._ready not in done:
                process.kill()
                stderr = process.take_raw()["stderr"][0]
                how = (
                    f"ended ({process.how_it_ended()})"
                    if done
                    else f"was not ready within {limits.start_seconds:g} s"
                )
                kind = _Killed if done and process.popen.returncode < 0 else SandboxError
                raise kind(f"The REPL's worker {how}. {self._explain(stderr)}")
            layers, problem = self._ready.result()
            if process.worker_pid:
                layers = sandbox.seen_from_outside(process.worker_pid, layers)
            layers = self._outer_layers(process) | layers
            self.report = sandbox.report(self.kind, layers, self.policy, self.required, self.report)
            if problem is not None:
                raise SandboxError(f"The REPL's work folder {self._folder.scratch}: {problem}")
        finally:
            self._ready = None
        process.take_raw()

    def _hello(self, folder: WorkDir, launch: Launch) -> dict[str, Any]:
        limits, policy, view = self.limits, self.policy, self._view(folder)
        room = sum(need(p) for p in self._payloads.values())
        read = [self._inside(path) for payload in self._payloads.values() for path in payload.paths]
        environment = self._environment(launch, view)
        return {
            "t": "hello",
            "limits": {
                "output_chars": limits.output_chars,
                "kept_chars": limits.kept_chars,
                "memory": limits.memory,
                "frame": limits.frame,
            },
            "mirror": {"path": view["said"], "size": MIRROR},
            "tools": [t.model_dump() for t in self._tools],
            "packages": self._packages_inside(),
            "confine": view
            | {
                "confine": self.confine,
                "parent": self.parent,
                "environment": [*environment, "LC_CTYPE", "PWD"],
                "memory": limits.memory + room,
                "file_size": limits.scratch,
                "files": policy.descriptors,
                "read": read,
                "scrub": self.scrub,
                "packages": self._packages_inside(),
            },
        }

    async def _make_payloads(self, folder: WorkDir) -> None:
        for name, context in self._contexts.items():
            if name not in self._payloads:
                self._payloads[name] = await self._payload(name, context, folder)

    async def _payload(self, name: str, context: Context, folder: WorkDir) -> Payload:
        place, stop = folder.inbox / f"{name}-{secrets.token_hex(4)}", threading.Event()

        def make() -> Payload:
            place.mkdir(mode=0o700)
            return context.payload(place, unpacked=self.limits.unpacked, stop=stop.is_set)

        self._writing = asyncio.ensure_future(asyncio.to_thread(make))
        try:
            return await asyncio.shield(self._writing)
        except asyncio.CancelledError:
            stop.set()
            raise
        except OSError as error:
            raise ContextError(f"The context cannot be read: {error}") from None

    async def _load(self, name: str) -> None:
        """Have the worker bind a context. A file travels as an open descriptor where it can.

        What a worker says of a context counts only before its first cell: afterwards it may be a
        thread of an earlier cell that answers, or one may have left no descriptor to take. Raises
        _NotLoaded then, whatever was said.
        """
        payload, process = self._payloads[name], self._worker
        fd = None
        if payload.path is not None and payload.mode != "folder" and process.takes_descriptors:
            try:
                fd = os.open(payload.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise ContextError(f"The context cannot be read: {error}") from None
        load_id = secrets.token_hex(16)
        load = {
            "t": "load",
            "id": load_id,
            "name": name,
            "mode": payload.mode,
            "args": self._arguments(payload),
            "path": None if payload.path is None else self._inside(payload.path),
            "fd": fd is not None,
        }
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._reply = load_id, future
        # a used one can be replaced
        patience = self.limits.start_seconds / (3 if self._used else 1)
        seconds = patience + payload.bytes / 1e7
        self._nuisance = Nuisance()
        either: set[asyncio.Future[Any]] = {future, process.ended}
        try:
            process.go()
            process.send(load, fd)
            process.resume_reading()
            done, _ = await asyncio.wait(
                either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self._reply = None
            if self._used:
                process.stop()
        if self._used and (future not in done or future.result() is not None):
            raise _NotLoaded
        if future not in done:
            how = (
                f"ended ({process.how_it_ended()})"
                if done
                else f"was not done within {seconds:.0f} s"
            )
            killed = bool(done) and process.popen.returncode < 0 and not process.killed
            await self._drop_worker()
            kind = _Killed if killed else SandboxError
            raise kind(
                f"The REPL's worker {how} while it loaded `{name}` ({payload.bytes:,} bytes)."
            )
        if (problem := future.result()) is not None:
            raise ContextError(f"The worker could not load `{name}`: {wire.cut(problem, 1000)}")

    def _arguments(self, payload: Payload) -> dict[str, Any]:
        files = payload.args.get("files")
        if files is None:
            return dict(payload.args)
        return payload.args | {"files": [[name, self._inside(Path(path))] for name, path in files]}

    async def _replace(self, why: str) -> None:
        """Another worker in the place of one that is there; the model is told."""
        self._lost = self._loss(why)
        await self._drop_worker()
        await self._ensure()

    async def _load_later(self, name: str) -> None:
        """Bind a context in a worker that may have run cells: in another one where those have left
        it unfit."""
        if self._used and await self._left_threads():
            return await self._replace("An earlier cell had left threads running.")
        self._worker.allow_memory(need(self._payloads[name]))
        try:
            await self._load(name)
        except _NotLoaded:
            await self._replace("An earlier cell had left the REPL unable to take another text.")

    async def _left_threads(self) -> bool:
        """Whether a thread of an earlier cell is there to take or answer what the host says to the
        worker."""
        process = self._worker
        try:
            process.go()
            for _ in range(THREAD_ENDS):
                if process.threads() <= self._threads:
                    return False
                await asyncio.sleep(0.01)
            return True
        finally:
            process.stop()

    async def _drop_worker(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._resources.kill_outside()
            await process.close()
            self._resources.process = None
            if not self._closed:  # the next worker meets nothing that a cell has made
                await self._cleaned()
                old = self._folder.set_aside()
                self._cleaning = asyncio.ensure_future(asyncio.to_thread(remove, old))
            for killer in self._resources.take_killers():
                await asyncio.to_thread(killer.wait)

    async def _cleaned(self) -> None:
        """An old work folder is gone."""
        if self._cleaning is not None:
            await asyncio.wait([self._cleaning])

    async def _ensure(self) -> None:
        """A worker is there; started anew where the last one is gone."""
        if not self._started or self._closed:
            raise SandboxError(
                "The REPL is not running: start() comes first, and nothing after aclose()."
            )
        process = self._process
        if process is not None and (process.killed or process.ended.done()):
            await process.close()
            self._lost = self._lost or self._loss(
                f"The worker ended between two cells ({process.how_it_ended()})."
            )
            await self._drop_worker()
        if self._process is None:
            try:
                await self._start_worker()
            except BaseException:
                await self._drop_worker()
                raise

    def _loss(self, why: str) -> str:
        """One sentence for the model."""
        again = " and ".join(f"`{name}`" for name in [*self._contexts, *self._bound][:6])
        return (
            f"{why} The REPL was started anew: all variables, functions, imports and files of earlier cells are gone; "
            f"{again} and the helpers are there again as at the start."
        )

    # -- frames

    def _has_room(self) -> bool:
        """Whether a frame may be read now: while a cell runs and can take more, or an answer is
        waited for."""
        return self._cell.has_room() if self._cell is not None else bool(self._ready or self._reply)

    def _on_frame(self, process: Process, message: dict[str, Any] | None, size: int) -> None:
        if process is not self._process:
            return
        nuisance, cell = self._nuisance, self._cell
        try:
            if message is None:
                raise wire.Bad("no frame")
            if not self._on_message(message, size):
                nuisance.stale += 1 + size // STALE_BYTES
        except wire.Bad:
            nuisance.bad += 1 + size // BAD_BYTES
        nuisance.bad += process.lines.take_dropped()
        if (reason := nuisance.too_much()) is not None:
            if cell is not None:
                cell.kill(reason)
            else:
                process.kill()

    def _on_message(self, message: dict[str, Any], size: int) -> bool:
        """False for what belongs to an earlier cell, is a repetition, or answers what nobody asked.
        Raises Bad."""
        kind, cell = message.get("t"), self._cell
        if kind in ("done", "broken", "request", "waits"):
            named = message.get("cell" if kind == "request" else "id")
            return cell is not None and named == cell.id and cell.on_message(message, size)
        if kind == "ready" and self._ready is not None and not self._ready.done():
            problem = message.get("problem")
            self._ready.set_result(
                (_layers(message.get("layers")), None if problem is None else str(problem)[:500])
            )
            return True
        if kind == "loaded" and self._reply is not None and message.get("id") == self._reply[0]:
            error = message.get("error")
            if error is not None and not isinstance(error, str):
                raise wire.Bad("an error that is no text")
            if not self._reply[1].done():
                self._reply[1].set_result(error)
            return True
        return False

    def _on_end(self, process: Process) -> None:
        cell = self._cell
        if cell is not None and cell.process is process and not cell.outcome.done():
            cell.outcome.set_result(CellEnd(died=process.how_it_ended()))


def contains(context: Context, place: Path | str) -> bool:
    """Whether a context is a folder in which this place lies."""
    return (
        context.kind == "folder"
        and context.path is not None
        and _real(place).is_relative_to(context.path)
    )


def around(context: Context, place: Path | str) -> ContextError:
    return ContextError(
        f"context: the folder {context.path} contains {place}, where the REPL keeps its own files. Give a folder that "
        "does not contain it, or set TMPDIR to a folder outside."
    )


def _real(path: Path | str) -> Path:
    return Path(os.path.realpath(path))


def _layers(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise wire.Bad("not a report")
    return {wire.cut(k, 50): wire.cut(v, 500) for k, v in list(value.items())[:20]}


def need(payload: Payload) -> int:
    """Address space a context takes, while it is loaded and after, with room for what holds it
    together."""
    return (64 << 20) + payload.memory
