"""What all nodes of one run share: the books, the slots, the record, and the list of what must be
ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from rlm_runtime import prompts
from rlm_runtime.budget import Ledger
from rlm_runtime.errors import BudgetExceeded, Cancelled, LMError, RlmError
from rlm_runtime.lms import redact
from rlm_runtime.lms.base import LM, Message, Reply, Sampling, ToolSpec, Usage
from rlm_runtime.repl.base import Environment
from rlm_runtime.replies.reader import Pace, read, size_of
from rlm_runtime.rlm import blanks
from rlm_runtime.rlm.options import Options
from rlm_runtime.trajectory import AnyEvent, BudgetNote, TrajectoryWriter

T = TypeVar("T")
log = logging.getLogger("rlm_runtime")
END_SECONDS = 15.0  # longest wait for what is being closed; past it the run ends all the same


class Meter:
    """Sums the usage of one node and all below it."""

    __slots__ = ("above", "usage")

    def __init__(self, above: Meter | None = None):
        self.usage = Usage()
        self.above = above

    def add(self, usage: Usage) -> None:
        meter: Meter | None = self
        while meter is not None:
            meter.usage = meter.usage + usage
            meter = meter.above


class Tree:
    """One run: the root node and everything it started."""

    def __init__(self, options: Options, ledger: Ledger, writer: TrajectoryWriter):
        self.options, self.ledger, self.writer = options, ledger, writer
        self.stopped: RlmError | None = None  # why no more sub-calls are made
        # what every node is told, and the user: an endpoint that cuts prompts
        self.notes: list[str] = []
        self.pace = Pace()
        self._slots = asyncio.Semaphore(options.concurrency)
        # One bound for each depth: a child that waits for its own children never holds what they
        # wait for.
        self._repls: dict[int, asyncio.Semaphore] = {}
        self._environments: set[Environment] = set()
        self._requests: set[asyncio.Task[Any]] = set()

    def emit(self, event: AnyEvent) -> None:
        self.writer.write(event)

    def note_budget(self, node: str, turns: int, refused: str | None = None) -> None:
        self.emit(
            BudgetNote(node=node, used={"turns": turns, **self.ledger.snapshot()}, refused=refused)
        )

    def _note_cut(self, lm: LM, read: int, messages: Sequence[Message]) -> None:
        window = self.options.window_of(lm) or read
        note = prompts.prompt_was_cut(lm.name, read, blanks.least_tokens(messages), window)
        log.warning("%s", note)
        self.notes.append(note)

    async def ask(
        self,
        lm: LM,
        messages: Sequence[Message],
        *,
        depth: int,
        meter: Meter,
        calls: int = 0,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None,
        estimate: int | None = None,
        last: bool = False,
    ) -> Reply:
        """One model call within the budget and a slot; its usage is what was charged.

        `calls` counts against Budget.sub_calls, `estimate` is the prompt's size where the caller
        knows it. Raises BudgetExceeded, LMError (whatever the model's client raised), Cancelled
        (the run is over)."""
        async with self._slots:
            if self.stopped is not None and not last:
                raise self.stopped
            budget, window = self.ledger.budget, self.options.window_of(lm)
            wanted = sampling.max_tokens
            if estimate is None and (
                budget.input_tokens is not None
                or budget.usd is not None
                or (window and (wanted is not None or calls))
            ):
                estimate = await _counted(lm, messages)
            if calls and window and estimate is not None and estimate >= window:
                raise LMError(
                    f"{lm.name}: the prompt has about {estimate:,} tokens; the model holds {window:,}, its reply "
                    f"included. Send pieces of at most {prompts.fitting_chars(window):,} characters.",
                    kind="context_overflow",
                    model=lm.name,
                )
            if window and wanted is not None and estimate is not None:
                wanted = max(1, min(wanted, window - estimate))
            reservation = await self.ledger.reserve(
                calls=calls,
                input_tokens=estimate or 0,
                max_tokens=wanted,
                price=lm.price,
                last=last,
            )
            if reservation.max_tokens != sampling.max_tokens:
                sampling = sampling.model_copy(update={"max_tokens": reservation.max_tokens})
            try:
                reply = await lm.complete(messages, sampling=sampling, tools=tools, schema=schema)
            except LMError:
                raise
            # an LM is anything with the right methods: its bugs end a call, not the host
            except Exception as e:
                said = redact.foreign(f"{type(e).__name__}: {e}")
                raise LMError(f"{lm.name}: {said}", kind="protocol", model=lm.name) from e
            else:
                if self.options.windows.watch(lm, messages, reply.usage):
                    self._note_cut(lm, reply.usage.input_tokens, messages)
                usage = reply.usage
                # an endpoint that does not count
                if not usage.input_tokens and not usage.output_tokens:
                    answer = Message(role="assistant", content=reply.text)
                    counted = {
                        "calls": usage.calls or 1,
                        "input_tokens": await _counted(lm, messages),
                        "output_tokens": await _counted(lm, [answer]),
                    }
                    usage = usage.model_copy(update=counted)
                usage = reservation.settle(usage, depth=depth)
                meter.add(usage)
                return reply if usage is reply.usage else reply.model_copy(update={"usage": usage})
            finally:
                reservation.release()

    # -- what must end with the run ----------------------------------------------------------------
    @contextlib.asynccontextmanager
    async def repl(self, depth: int, make: Callable[[], Environment]) -> AsyncIterator[Environment]:
        """A child's REPL, once there is room for one at this depth; closed whatever happens."""
        slots = self._repls.setdefault(depth, asyncio.Semaphore(self.options.max_repls))
        async with slots:
            if self.stopped is not None:
                raise self.stopped
            environment = make()
            self._environments.add(environment)
            try:
                yield environment
            finally:
                await finish(environment.aclose())
                self._environments.discard(environment)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Counts the current task among those that `stop` ends."""
        task = asyncio.current_task()
        assert task is not None, "called in a task"
        self._requests.add(task)
        try:
            yield
        finally:
            self._requests.discard(task)

    async def stop(self, why: RlmError | None = None) -> None:
        """No more sub-calls; those that run are cancelled and waited for. A REPL may ask again
        after `resume`."""
        self.stopped = why or Cancelled("the run is over.")
        tasks = [t for t in self._requests if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            await finish(_wait(tasks))

    async def close(self) -> None:
        """Ends everything that is left. Never raises."""
        await self.stop(self.stopped)
        for environment in list(self._environments):
            await finish(environment.aclose())
        self._environments.clear()


async def _counted(lm: LM, messages: Sequence[Message]) -> int:
    return await read(size_of([m.content for m in messages]), lm.count_tokens, messages)


async def _wait(tasks: Sequence[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks, timeout=END_SECONDS)


async def finish(work: Coroutine[Any, Any, Any], seconds: float = END_SECONDS) -> None:
    """Await cleaning-up that must happen although the task may be cancelled (again) meanwhile: it
    goes on, and the cancellation is raised after it. Bounded in time; what the work raises is
    dropped."""
    task = asyncio.ensure_future(work)
    deadline = asyncio.get_running_loop().time() + seconds
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            task.cancel()
            break
        try:
            await asyncio.wait([task], timeout=left)
        except asyncio.CancelledError as e:
            cancelled = e
    if task.done() and not task.cancelled():
        task.exception()  # seen, so that nobody warns about it
    if cancelled is not None:
        raise cancelled


async def in_order(
    work: Callable[..., Awaitable[T]], items: Sequence[tuple[Any, ...]], width: int, pace: Pace
) -> list[T]:
    """`await work(*item)` for all items, `width` at a time; the results in the order of the items.

    A few workers share the list, so 100,000 items are not 100,000 tasks. Cancelling cancels all."""
    if len(items) == 1:
        return [await work(*items[0])]
    results: list[Any] = [None] * len(items)
    todo = iter(enumerate(items))

    async def worker() -> None:
        for i, item in todo:
            results[i] = await work(*item)
            await pace.step()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(width, len(items))):
            group.create_task(worker())
    return results


def why_not(error: Exception) -> tuple[str, str]:
    """Message and kind of a failed call, as the REPL gets them."""
    if isinstance(error, BudgetExceeded):
        return str(error), "budget"
    if isinstance(error, LMError):
        return str(error), error.kind
    if isinstance(error, Cancelled):
        return str(error), "cancelled"
    return str(error), getattr(error, "kind", "refused")
