"""One completion from start to result, whatever happens: answered, stopped by a limit, cancelled,
or failed.

The run is a task of its own. Whoever waits for it may go away; the run still ends its calls and
workers, writes the end of its trajectory, and has a result.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from rlm_runtime import __version__, prompts
from rlm_runtime.budget import Ledger
from rlm_runtime.context import Context
from rlm_runtime.errors import BudgetExceeded, Cancelled, RlmError
from rlm_runtime.lms import redact
from rlm_runtime.repl.base import Environment
from rlm_runtime.rlm.history import History
from rlm_runtime.rlm.loop import Node
from rlm_runtime.rlm.nodes import open_task, spawn
from rlm_runtime.rlm.options import Options
from rlm_runtime.rlm.results import CANCELLED, ERROR, Ending, RLMResult, at_limit
from rlm_runtime.rlm.tree import END_SECONDS, Meter, Tree, finish
from rlm_runtime.structured import Shape
from rlm_runtime.trajectory import (
    AnyEvent,
    ContextLoaded,
    RunEnd,
    RunStart,
    TrajectoryWriter,
    run_folder,
)

CANCEL_SECONDS = 20.0  # longest that a cancelled conversation may take to end
POLL_SECONDS = 0.05

CancelEvent = threading.Event | asyncio.Event


@dataclass
class SessionState:
    """What a session keeps from one completion to the next."""

    environment: Environment
    history: History = field(default_factory=History)
    completions: int = 0
    started: bool = False
    folder: Path | None = None


class Run:
    """A completion in progress, as `RLM.start` returns it. Lives in the event loop that it was
    started in."""

    def __init__(
        self,
        options: Options,
        context: Context,
        question: str | None,
        shape: Shape | None,
        *,
        session: SessionState | None = None,
        cancel: CancelEvent | None = None,
    ):
        loop = asyncio.get_running_loop()
        self.id = secrets.token_hex(6)
        self._options, self._context, self._question, self._shape = (
            options,
            context,
            question,
            shape,
        )
        self._session = session
        self._event = cancel
        self._environment = session.environment if session else options.environment_for(0)
        self._writer = self._open_record()
        self._cancelled = False
        self._result: RLMResult | None = None
        self._conversation: asyncio.Task[Ending] | None = None
        self._overdue: asyncio.Future[None] = loop.create_future()
        self._task = loop.create_task(self._main(), name=f"rlm-run-{self.id}")

    # -- for the caller ----------------------------------------------------------------------------
    @property
    def folder(self) -> Path | None:
        """Where the trajectory is written; None without a `log_dir`."""
        return self._writer.folder

    @property
    def done(self) -> bool:
        return self._task.done()

    def cancel(self) -> None:
        """End the run: its calls, cells and workers. `result()` then gives what there is.
        Idempotent."""
        if not self._cancelled:
            self._cancelled = True
            # One that does not end, because an LM or a tool swallows the cancellation, is left
            # behind.
            asyncio.get_running_loop().call_later(
                CANCEL_SECONDS, lambda: self._overdue.done() or self._overdue.cancel()
            )
            if self._conversation is not None:
                self._conversation.cancel()

    async def result(self) -> RLMResult:
        """Wait for the end. A caller that is cancelled while it waits does not cancel the run.

        Raises LMError, SandboxError or another RlmError where the run failed with nothing to show;
        its `result` attribute is the RLMResult with usage and trajectory."""
        return await asyncio.shield(self._task)

    def events(self) -> AsyncIterator[AnyEvent]:
        """The run's events from this call on, as they happen; the iterator ends with the run.
        Breaking off does not end the run."""
        queue: asyncio.Queue[AnyEvent | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: AnyEvent | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(queue.put_nowait, event)

        self._writer.listen(put)
        self._task.add_done_callback(lambda _: put(None))

        async def drain() -> AsyncIterator[AnyEvent]:
            try:
                while (event := await queue.get()) is not None:
                    yield event
            finally:
                self._writer.unlisten(put)

        return drain()

    async def end(self) -> None:
        """Cancel, if it still runs, and wait (bounded) for the end. Never raises what the run
        raised."""
        if not self._task.done():
            self.cancel()
            await asyncio.wait({self._task}, timeout=CANCEL_SECONDS + END_SECONDS)
        if self._task.done() and not self._task.cancelled():
            self._task.exception()  # seen, so that nobody warns about it

    async def to_the_end(self) -> RLMResult:
        """As `result`, but cancelling the caller cancels the run, waits (bounded) until it has
        ended, and raises CancelledError with the partial result as its attribute `result`."""
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError as e:
            await self.end()
            e.result = self._result  # type: ignore[attr-defined]  # documented: CancelledError.result
            raise

    async def through_interrupts(self) -> RLMResult:
        """As `result`, but a first cancellation of the caller (Ctrl-C) ends the run and returns its
        partial result."""
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            self.cancel()
            return await asyncio.shield(self._task)

    # -- the run -----------------------------------------------------------------------------------
    async def _main(self) -> RLMResult:
        options, session = self._options, self._session
        tree = Tree(options, Ledger(options.budget), self._writer)
        lm = options.node_lm(0)
        node = Node(
            tree,
            self._environment,
            spawn,
            lm=lm,
            tools=options.tools,
            meter=Meter(),
            question=self._question,
            shape=self._shape,
            history=session.history if session else None,
        )
        interrupted: asyncio.CancelledError | None = None
        watcher = asyncio.create_task(self._watch(self._event)) if self._event is not None else None
        try:
            self._write_start(lm)
            work = self._conversation = asyncio.create_task(self._converse(node))
            if self._cancelled:
                work.cancel()
            while not work.done() and not self._overdue.done():
                try:
                    both: set[asyncio.Future[Any]] = {work, self._overdue}
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                # the loop is being closed, or somebody found this task
                except asyncio.CancelledError as e:
                    interrupted = e
                    self.cancel()
                    work.cancel()
            ending = await self._ending(node, work)
        finally:
            if watcher is not None:
                watcher.cancel()
            await finish(self._clean_up(tree))
            if session is not None:
                session.history = node.history
                session.completions += session.started
        try:
            await self._end_record(node, ending)
        except asyncio.CancelledError as e:
            interrupted = interrupted or e
        self._result = self._close_record(node, tree, ending)
        if interrupted is not None:
            raise interrupted
        if ending.cause is not None:
            ending.cause.result = self._result  # type: ignore[attr-defined]  # any exception can be the cause
            raise ending.cause
        return self._result

    async def _converse(self, node: Node) -> Ending:
        """The root's conversation within `seconds`. What it raises is the business of `_ending`."""
        ledger = node.tree.ledger
        clock = asyncio.timeout(ledger.seconds_left())
        try:
            async with clock:
                await self._open(node)
                return await node.run()
        except TimeoutError:
            if not clock.expired():
                raise
        limit = ledger.budget.seconds or 0.0
        why = BudgetExceeded(
            "seconds", ledger.seconds, limit, f"the limit of {limit:g} s is reached."
        )
        await node.tree.stop(why)
        node.tree.note_budget(node.id, node.turns, refused="seconds")
        ending = await node.look_again()
        return ending or await node.last_call(at_limit("seconds"), str(why))

    async def _open(self, node: Node) -> None:
        session = self._session
        if session is None or not session.started:
            await node.start(self._context)
            if session is not None:
                session.started = True
            open_task(node, self._context)
            return
        name = f"context_{session.completions}"
        await node.environment.rebind_context(self._context, name)
        await node.environment.reset_answer()
        fields = await asyncio.to_thread(self._writer.context_fields, self._context, name)
        node.tree.emit(ContextLoaded(node=node.id, **fields))
        open_task(node, self._context, name)

    async def _ending(self, node: Node, work: asyncio.Task[Ending]) -> Ending:
        if not work.done() or work.cancelled():
            await node.tree.stop(Cancelled("the run was cancelled."))
            try:
                found = await node.look_again() if work.done() else None
            except asyncio.CancelledError:
                found = None
            return found or await node.salvaged(CANCELLED, "the run was cancelled.")
        error = work.exception()
        if error is None:
            return work.result()
        if not isinstance(error, Exception):
            raise error
        if not isinstance(error, RlmError):
            wrapped = RlmError(redact.foreign(f"the run failed: {type(error).__name__}: {error}"))
            wrapped.__cause__ = error
            error = wrapped
        return await node.salvaged(ERROR, str(error), cause=error)

    async def _clean_up(self, tree: Tree) -> None:
        await tree.close()
        if self._session is None:
            await self._environment.aclose()

    async def _watch(self, event: CancelEvent) -> None:
        """Polled: the event may be a thread's, or belong to another loop."""
        while not event.is_set():
            await asyncio.sleep(POLL_SECONDS)
        self.cancel()

    # -- the record --------------------------------------------------------------------------------
    def _open_record(self) -> TrajectoryWriter:
        options, session = self._options, self._session
        folder = None
        if options.log_dir is not None:
            folder = (
                session.folder
                if session is not None and session.folder
                else run_folder(options.log_dir, self.id)
            )
        on_event: Any = options.on_event
        if hasattr(on_event, "for_run"):
            on_event = on_event.for_run(self.id)
        writer = TrajectoryWriter(
            folder, on_event, append=session is not None and session.folder is not None
        )
        if options.verbose:
            from rlm_runtime.live import LiveLines

            writer.listen(LiveLines())
        if session is not None:
            session.folder = folder
        return writer

    def _write_start(self, lm: Any) -> None:
        options = self._options
        settings: Mapping[str, Any] = {
            "environment": options.environment,
            "limits": options.limits.model_dump(),
            "concurrency": options.concurrency,
            "compact_at": options.compact_at,
            "version": __version__,
            "prompts": prompts.VERSION,
            "prompt_variant": options.variant_of(lm),
            "tools": sorted(options.tools),
            "sub_tools": sorted(options.sub_tools),
            "tool_values": {
                n: t.value for n, t in {**options.sub_tools, **options.tools}.items() if t.is_value
            },
            "tips": options.tips,
            "packages": list(options.packages),
            "models": {str(d): m.name for d, m in options.by_depth.items()},
            "output": self._shape.schema if self._shape is not None else None,
        }
        self._writer.write(
            RunStart(
                run=self.id,
                started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                question=self._question,
                root=lm.name,
                sub=options.sub.name,
                max_depth=options.max_depth,
                budget=options.budget.model_dump(),
                settings=dict(settings),
                session_turn=self._session.completions if self._session else 0,
            )
        )

    async def _end_record(self, node: Node, ending: Ending) -> None:
        """Write the last event, and wait until all are recorded."""
        ledger, writer = node.tree.ledger, self._writer
        end = RunEnd(
            stop_reason=ending.reason,
            answer=to_jsonable_python(ending.answer, fallback=repr),
            error=ending.error,
            usage=ledger.total,
            usage_by_depth={str(d): u for d, u in sorted(ledger.by_depth.items())},
            turns=node.turns,
            seconds=round(ledger.seconds, 6),
        )
        writer.write(end)
        self._seconds = end.seconds
        if writer.behind:
            await finish(asyncio.to_thread(writer.flush))

    def _close_record(self, node: Node, tree: Tree, ending: Ending) -> RLMResult:
        ledger, writer = tree.ledger, self._writer
        writer.close()
        notes = [*self._context.notes, *tree.notes]
        if self._context.keep and writer.folder is not None and self._context.sha256 is None:
            notes.append(
                "The piped text is too long to be kept with the trajectory; replay needs it as --context."
            )
        if writer.note is not None:
            notes.append(writer.note)
        return RLMResult(
            answer=ending.answer,
            stop_reason=ending.reason,
            partial=ending.partial,
            text=ending.text,
            error=ending.error,
            error_kind=ending.kind,
            usage=ledger.total,
            usage_by_depth=dict(sorted(ledger.by_depth.items())),
            turns=node.turns,
            sub_calls=ledger.sub_calls,
            seconds=self._seconds,
            run=self.id,
            trajectory=writer.folder,
            sandbox=node.environment.report,
            notes=tuple(notes),
            record=writer,
        )
