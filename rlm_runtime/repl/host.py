"""What the environments share: cells, bound values and contexts of one REPL, over one worker after
another (`hosted`)."""

from __future__ import annotations

import asyncio
import dataclasses
import keyword
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Self, TypeVar

from rlm_runtime.context import Context, Payload
from rlm_runtime.errors import ContextError, UsageError
from rlm_runtime.repl import wire
from rlm_runtime.repl.base import (
    Answer,
    CellError,
    CellResult,
    Handler,
    SandboxReport,
    ToolInfo,
)
from rlm_runtime.repl.cell import Cell, CellEnd
from rlm_runtime.repl.hosted import HostedWorker, Nuisance, around, contains
from rlm_runtime.replies import pieces

T = TypeVar("T")

HELPERS = frozenset(
    [
        "llm_query",
        "llm_batch",
        "llm_query_batched",
        "rlm_query",
        "rlm_batch",
        "rlm_query_batched",
        "answer",
        "FINAL",
        "FINAL_VAR",
        "SHOW_VARS",
        "CallError",
        "outputs",
    ]
)


class HostedEnvironment(HostedWorker):
    """What the environments share. Belongs to one event loop; `run` calls are serial."""

    async def start(self, context: Context, tools: tuple[ToolInfo, ...] = ()) -> SandboxReport:
        """Start the worker and bind `context`. Raises SandboxError, ContextError, UsageError (a
        tool's name)."""
        async with self._lock:
            if self._started:
                raise UsageError(
                    "This environment has been started already; make another one for another run."
                )
            for tool in tools:
                _check_name(tool.name, "a tool")
            self._started, self._tools = True, tuple(tools)
            self._contexts["context"] = context
            try:
                await self._start_worker()
            except BaseException:
                self._closed = True
                await self._close_once()
                raise
            assert self.report is not None, "made when the worker was ready"
            return self.report

    async def run(self, code: str, handler: Handler) -> CellResult:
        """Run one cell (see `Environment.run`). Raises SandboxError where no worker can be started
        any more."""
        async with self._lock:
            await self._ensure()
            cell = await self._run(code, handler)
            if cell.outcome.result().broken:
                # An earlier cell has left the interpreter unable to begin another one; this one has
                # not run at all.
                await self._replace(
                    "An earlier cell had broken the interpreter, or left it no memory."
                )
                cell = await self._run(code, handler)
            return await self._result(cell)

    async def _run(self, code: str, handler: Handler) -> Cell:
        process, mine = self._worker, self._resources
        tools = frozenset(tool.name for tool in self._tools if not tool.is_value)
        cell = Cell(
            process, handler, self.limits, self.policy, self._folder, tools, mine.kill_outside
        )
        message = {
            "t": "cell",
            "id": cell.id,
            "n": self._cells,
            "code": pieces.valid(code),
            "binds": self._to_bind,
            "reset_answer": self._reset_answer,
            "raw": self._raw,
        }
        self._to_bind, self._reset_answer, self._raw = {}, False, {}
        process.take_raw()
        self._cell, self._nuisance = cell, Nuisance()
        self._cells += 1
        self._used = True
        try:
            process.go()
            process.allow_cpu(self.limits.cell_seconds + self.limits.grace_seconds + 5)
            process.send(message)
            process.resume_reading()
            await cell.watch()
        except asyncio.CancelledError:
            await cell.stop("the run was cancelled")
            await self._after(cell)
            if process.killed or process.ended.done():
                self._lost = self._loss("The run was cancelled and its cell did not stop.")
                await self._drop_worker()
            raise
        await self._after(cell)
        return cell

    async def _after(self, cell: Cell) -> None:
        self._cell = None
        await cell.finish()

    async def _result(self, cell: Cell) -> CellResult:
        end, times, raw = cell.outcome.result(), cell.times(), cell.process.take_raw()
        lost, self._lost = self._lost, None
        if end.fields is not None:
            fields = end.fields | (
                _interrupted(end.fields, cell.reason) if cell.interrupted else {}
            )
            if (wrong := await cell.wrong_with_files()) is not None:  # made after the last look
                lost = self._loss(f"The cell left {wrong}.")
                await self._drop_worker()
        else:
            kind, status, said = _ended(end, cell.reason)
            lost = self._loss(said)
            fields = {
                "status": status,
                "error": CellError(type=kind, message=said),
                "answer": Answer(),
            }
            for name, words in self._folder.last_words().items():
                fields |= {
                    name: wire.cut(words, self.limits.output_chars),
                    f"{name}_chars": len(words),
                }
            raw["stderr"] = _own_lines(raw["stderr"][0]), raw["stderr"][1]
            await self._drop_worker()
        for name, (text, count) in raw.items():
            if text:
                if fields[name] and not fields[name].endswith("\n"):
                    text = "\n" + text
                fields[name] = wire.cut(fields[name] + text, self.limits.output_chars + 200)
                fields[f"{name}_chars"] += count
                if name == "stdout":
                    self._raw[str(self._cells - 1)] = text
        return CellResult(lost=lost, **fields, **times)

    # -- other operations

    async def bind(self, name: str, value: Any) -> None:
        """Bind a JSON value under `name` from the next cell on, also after a restart. Raises
        UsageError."""
        _check_name(name, "a bound value")
        try:
            wire.encode({"v": value})
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"bind({name!r}): the value is not JSON: {error}") from None
        async with self._lock:
            self._bound[name] = self._to_bind[name] = value

    async def rebind_context(self, context: Context, name: str = "context") -> None:
        """Load another context under `name`, also after a restart. Raises ContextError, UsageError,
        SandboxError."""
        _check_name(name, "a context", but=("context",))
        async with self._lock:
            await self._ensure()
            folder = self._folder
            if contains(context, folder.root):
                raise around(context, folder.root.parent)
            payload = await self._payload(name, context, folder)
            if payload.mode == "folder":
                payload = await asyncio.to_thread(
                    linked_into, payload, folder.inbox / f"{name}-{secrets.token_hex(4)}"
                )
            before = self._contexts.get(name), self._payloads.get(name)
            self._contexts[name], self._payloads[name] = context, payload
            try:
                await self._load_later(name)
            except BaseException:
                _put_back(self._contexts, name, before[0])
                _put_back(self._payloads, name, before[1])
                raise

    async def reset_answer(self) -> None:
        """`answer` is {"content": None, "ready": False} again from the next cell on."""
        self._reset_answer = True

    async def aclose(self) -> None:
        """Kill the worker, remove its folder, close every descriptor. Idempotent, safe in any
        state."""
        self._closed = True
        if self._cell is not None:
            self._cell.kill("the REPL was closed")
        async with self._lock:
            await self._close_once()

    async def _close_once(self) -> None:
        """The one closing there is: a caller that is cancelled leaves it, the next one waits for
        it."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._drop_worker()
        if self._writing is not None:
            await asyncio.wait([self._writing])
        await self._cleaned()
        folder, self._resources.folder = self._resources.folder, None
        if folder is not None:
            await asyncio.to_thread(folder.remove)
        self._finalizer()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.aclose()


def _check_name(name: str, what: str, but: tuple[str, ...] = ()) -> None:
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or keyword.iskeyword(name)
        or name.startswith("__")
    ):
        raise UsageError(
            f"The name of {what} in the REPL must be a Python identifier, not {name!r}."
        )
    if (name in HELPERS or name == "context") and name not in but:
        raise UsageError(f"{name!r} is a name of the REPL's own; give {what} another one.")


def _put_back(table: dict[str, T], name: str, old: T | None) -> None:
    if old is None:
        table.pop(name, None)
    else:
        table[name] = old


def _interrupted(fields: dict[str, Any], reason: str) -> dict[str, Any]:
    """What becomes of a result whose cell was interrupted and stopped."""
    trace = fields["error"].traceback if fields["error"] is not None else ""
    message = f"The cell was interrupted: {reason}. Its variables are kept."
    return {
        "status": "timeout",
        "error": CellError(type="CellTimeout", message=message, traceback=trace),
    }


def _ended(end: CellEnd, reason: str) -> tuple[str, str, str]:
    """Error, status and a sentence for a cell that took its worker with it."""
    if end.broken:
        return "WorkerBroken", "crashed", "The interpreter could not begin the cell."
    if end.died == "killed":
        return "CellKilled", "killed", f"The cell was killed: {reason}."
    return "WorkerDied", "crashed", f"The cell ended the worker process ({end.died})."


def _own_lines(crash: str) -> str:
    """A crash report of the interpreter without the frames that are not the cell's."""
    lines = [
        line for line in crash.split("\n") if not line.startswith('  File "') or '"<cell ' in line
    ]
    return "\n".join(lines)


FOLDER_COPY = 256 << 20  # bytes that may be copied where files cannot be linked


def linked_into(payload: Payload, place: Path) -> Payload:
    """A folder payload with its files linked, or copied, to where a running worker may read. Raises
    ContextError."""
    place.mkdir(mode=0o700)
    copied, files = 0, []
    for i, (name, path) in enumerate(payload.args["files"]):
        target = place / str(i)
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError:
            copied += os.stat(path).st_size
            if copied > FOLDER_COPY:
                raise ContextError(
                    f"A folder of more than {FOLDER_COPY >> 20} MiB on another file system cannot be given to a REPL that "
                    "is running; start a new session with it."
                ) from None
            shutil.copyfile(path, target)
        files.append([name, str(target)])
    return dataclasses.replace(
        payload, path=None, paths=(place,), args={**payload.args, "files": files}
    )
