"""One cell on its way: the requests it makes, the clocks it runs against, how it is interrupted and
how it ends."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlm_runtime.repl import wire
from rlm_runtime.repl.base import Handler, Limits, Outcome, Request
from rlm_runtime.repl.process import Process
from rlm_runtime.repl.sandbox import SandboxPolicy
from rlm_runtime.repl.workdir import Watch, WorkDir
from rlm_runtime.replies.reader import INLINE, size_of

OUTSTANDING = 256  # request frames under way at once; further ones wait unread
WATCH = 0.1  # seconds between looks at a running cell
AGAIN = 0.25  # seconds between two interrupts
UNANSWERED = 2.0  # seconds after which a worker that is not heard is taken to run
PATIENCE = 5.0  # seconds for calls that were cancelled to end
ONE_FOR_ALL = 1000  # a batch of more calls is refused with one outcome


@dataclass
class CellEnd:
    """How a cell ended: with a message of the worker, or with the worker."""

    fields: dict[str, Any] | None = None
    broken: bool = False  # the worker could not even begin it
    died: str | None = None  # how; "killed" by us


class Cell:
    """`kill(reason)` of the environment ends the worker for good."""

    def __init__(
        self,
        process: Process,
        handler: Handler,
        limits: Limits,
        policy: SandboxPolicy,
        folder: WorkDir,
        tools: frozenset[str],
        kill_outside: Callable[[], None],
    ):
        self.id = secrets.token_hex(16)
        self.process, self._handler, self._limits, self._policy = process, handler, limits, policy
        self._tools, self._kill_outside = tools, kill_outside
        self.started, self._cpu = time.monotonic(), process.cpu()
        self.outcome: asyncio.Future[CellEnd] = asyncio.get_running_loop().create_future()
        # when the first interrupt was sent; when the next one is
        self.interrupted = self._again = 0.0
        self.reason = ""
        self._last = 0  # number of the newest request
        self._asked = 0  # calls made: a batch counts its prompts
        self._tasks: set[asyncio.Task[None]] = set()
        self._encoding = asyncio.Lock()
        self._waiting = self._held = 0  # requests under way, their bytes
        self._waited, self._since = 0.0, 0.0  # seconds spent waiting; when those not in it began
        # the cell's main thread waits while calls are under way, as far as is known
        self._main_waits = True
        # when the worker was asked, first and last; 0: it has answered
        self._asked_main = self._asked_again = 0.0
        self._files = Watch(folder.scratch, limits.scratch, policy.files)
        self._next_look = self._urgent_look = 0.0

    # -- what it asks for

    def has_room(self) -> bool:
        """Whether another frame may be read; one that may not waits in the worker's end of the
        channel."""
        unsent = self.process.unsent
        if not self._waiting and not unsent:
            return True
        return self._waiting < OUTSTANDING and self._held + unsent < self._limits.frame

    def on_message(self, message: dict[str, Any], size: int) -> bool:
        """A message that names this cell; False where it is a repetition. Raises Bad."""
        if self.outcome.done():
            return False
        kind = message["t"]
        if kind == "done":
            self.outcome.set_result(
                CellEnd(fields=wire.done_of(message, self._limits.output_chars))
            )
        elif kind == "waits":
            if not self._asked_main:
                return False
            self._asked_main = 0.0
            self._note_main(message.get("waits") is True)
        elif kind == "broken":
            # it has begun, or it could not have asked for anything: it is not to be run again
            if self._last:
                raise wire.Bad("a cell that had begun")
            # its reasons are a worker's, not to be told in our words
            self.outcome.set_result(CellEnd(broken=True))
        else:
            return self._on_request(message, size)
        return True

    def _on_request(self, message: dict[str, Any], size: int) -> bool:
        number, calls = wire.number_of(message)
        if number <= self._last:
            return False
        self._last = number
        self._asked += calls
        if self._asked > self._limits.requests:
            self._refuse(
                number,
                calls,
                f"one cell can make {self._limits.requests:,} calls, and this one has",
            )
            return True
        request = wire.request_of(message)
        if self.interrupted:
            self._refuse(number, calls, f"the cell was interrupted: {self.reason}")
        elif request.method == "tool" and request.name not in self._tools:
            self._refuse(number, calls, f"there is no tool {request.name!r}")
        else:
            if not self._waiting:
                self._since, self._main_waits = time.monotonic(), True
            self._waiting += 1
            self._held += size
            task = asyncio.get_running_loop().create_task(self._serve(number, request, size))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return True

    async def _serve(self, number: int, request: Request, size: int) -> None:
        calls = max(len(request.prompts), 1)
        try:
            outcomes = await self._handler(request)
            if len(outcomes) != calls:
                said = f"the handler gave {len(outcomes)} outcomes for {calls} calls"
                outcomes = [Outcome(error=said, kind="server")] * calls
            await self._answer_beside(number, outcomes)
        # a handler never raises; if one does, the cell is told and the run goes on
        except Exception as error:
            kind = getattr(error, "kind", None)
            said = f"{type(error).__name__}: {error}"
            self._answer(
                number,
                [Outcome(error=said, kind=kind if isinstance(kind, str) else "server")] * calls,
            )
        except asyncio.CancelledError:  # a thread of the cell may wait for it even so
            self._refuse(number, calls, f"the cell was interrupted: {self.reason or 'it is over'}")
            raise
        finally:
            if self._waiting == 1:
                self._note_main(True)
            self._waiting -= 1
            self._held -= size
            self.process.resume_reading()

    def _refuse(self, number: int, calls: int, why: str) -> None:
        self._answer(
            number, [Outcome(error=why, kind="refused")] * (1 if calls > ONE_FOR_ALL else calls)
        )

    def _answer(self, number: int, outcomes: list[Outcome]) -> None:
        if not self.outcome.done():
            self.process.send_encoded(self._encoded(number, outcomes))

    async def _answer_beside(self, number: int, outcomes: list[Outcome]) -> None:
        """The same, where the answer is long written on a thread; one at a time, or nothing else
        would get one."""
        if size_of([o.value for o in outcomes]) <= INLINE:
            return self._answer(number, outcomes)
        async with self._encoding:
            if not self.outcome.done():
                message = await asyncio.to_thread(self._encoded, number, outcomes)
                if not self.outcome.done():
                    self.process.send_encoded(message)

    def _encoded(self, number: int, outcomes: list[Outcome]) -> bytes:
        said = [
            {"v": o.value} if o.error is None else {"e": o.error, "k": o.kind} for o in outcomes
        ]
        message = {"t": "reply", "cell": self.id, "id": number, "outcomes": said}
        try:
            return wire.encode(message)
        # a value that is no JSON: a tool's, most likely
        except (TypeError, ValueError, RecursionError) as error:
            problem = {"e": f"the answer is not JSON: {error}", "k": "server"}
            return wire.encode(message | {"outcomes": [problem] * len(said)})

    # -- its clocks

    def waited(self, now: float) -> float:
        """Seconds it spent waiting for calls: one open in a thread is no wait where the main thread
        goes on."""
        return self._waited + (now - self._since if self._waiting and self._main_waits else 0.0)

    def _note_main(self, waits: bool) -> None:
        now = time.monotonic()
        if self._waiting and self._main_waits:
            self._waited += now - self._since
        self._since, self._main_waits = now, waits

    def _ask_main(self, now: float) -> None:
        """Ask the worker whether its main thread waits, too. One that does not answer, though it
        could, does not."""
        if not self._asked_main or now - self._asked_again > UNANSWERED / 4:
            self._asked_main, self._asked_again = self._asked_main or now, now
            self.process.send({"t": "look", "id": self.id})
        if now - self._asked_main > (UNANSWERED if self.has_room() else self._limits.cell_seconds):
            self._note_main(False)

    def times(self) -> dict[str, float]:
        now = time.monotonic()
        wall = now - self.started
        return {
            "wall_seconds": wall,
            "waited_seconds": min(self.waited(now), wall),
            "cpu_seconds": max(self.process.cpu() - self._cpu, 0.0),
        }

    async def watch(self) -> None:
        """Until it has ended: its time, its files, its threads."""
        while not self.outcome.done():
            await asyncio.wait({self.outcome}, timeout=self._pause(time.monotonic()))
            if self.outcome.done():
                break
            self._look(time.monotonic())
            await self._look_at_files()

    def _pause(self, now: float) -> float:
        if self.interrupted:
            left = self._again - now
        else:
            left = self._limits.cell_seconds - (now - self.started - self.waited(now))
        return max(min(WATCH, left, self._files.glance()), 0.005)

    def _look(self, now: float) -> None:
        limits, process = self._limits, self.process
        if self.outcome.done():
            return
        if self._waiting and now - self._since > WATCH:
            self._ask_main(now)
        if self.interrupted and now - self.interrupted > limits.grace_seconds:
            self.kill(f"{self.reason}, and did not stop when it was interrupted")
        elif process.threads() > self._policy.threads:
            self.kill(f"it had more than {self._policy.threads} threads")
        elif self.interrupted:
            if now >= self._again:
                self.interrupt(self.reason)
        elif now - self.started - self.waited(now) > limits.cell_seconds:
            self.interrupt(
                f"it ran for more than {limits.cell_seconds:g} s (waiting for calls not counted)"
            )
        elif process.cpu() - self._cpu > limits.cell_seconds:
            self.interrupt(f"it used more than {limits.cell_seconds:g} s of CPU time")

    async def _look_at_files(self) -> None:
        """From time to time; at once where the disk has filled up by what is allowed, and with the
        worker held then."""
        now = time.monotonic()
        urgent = not self._files.glance() and now >= self._urgent_look
        if self.outcome.done() or not (urgent or now >= self._next_look):
            return
        look, held = asyncio.ensure_future(self.wrong_with_files()), False
        try:
            while not look.done():
                if not held and not self._files.glance():
                    held = True
                    self.process.stop()
                await asyncio.wait({look}, timeout=self._pause(time.monotonic()))
                self._look(time.monotonic())
            if look.result() is not None and not self.outcome.done():
                self.kill(f"it had {look.result()}")
        finally:
            look.cancel()
            if held and not self.outcome.done():
                self.process.go()

    async def wrong_with_files(self) -> str | None:
        """What is too much in its work folder, or held without a name there."""
        began = time.monotonic()
        wrong = await asyncio.to_thread(
            self._files.look, self.process.worker_pid or self.process.pid
        )
        now = time.monotonic()
        self._urgent_look = now + (now - began)  # somebody else may be filling the disk
        self._next_look = now + 10 * (now - began)  # looking takes a tenth of the time at most
        return wrong

    # -- its end

    def interrupt(self, reason: str) -> None:
        """Ask it to stop; calls under way are cancelled."""
        self._again = time.monotonic() + AGAIN
        if not self.interrupted:
            self.interrupted, self.reason = time.monotonic(), reason
        for task in self._tasks:
            task.cancel()
        self.process.send(
            {"t": "interrupt", "id": self.id, "why": f"the cell was interrupted: {reason}"}
        )

    def kill(self, reason: str) -> None:
        """End it with its worker."""
        self.reason = reason
        if not self.outcome.done():
            self.outcome.set_result(CellEnd(died="killed"))
        self._kill_outside()
        self.process.kill()

    async def stop(self, reason: str) -> None:
        """Interrupt it and wait for its end; cancelled once more, it is killed."""
        self.interrupt(reason)
        try:
            await self.watch()
        except asyncio.CancelledError:
            self.kill(reason)

    async def finish(self) -> None:
        """It is over: nothing of the worker runs, no call of its goes on."""
        self.process.stop()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE)
