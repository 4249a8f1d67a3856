"""The turn loop: ask the model, run the cells of its reply, tell it what came out; until the answer
is ready.

A node is one such conversation with one REPL: the root of a run, or a child RLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlm_runtime import prompts
from rlm_runtime.context import Context
from rlm_runtime.errors import BudgetExceeded, LMError, RlmError
from rlm_runtime.lms.base import LM, Message, Reply
from rlm_runtime.repl.base import CellResult, Environment, Outcome, Request
from rlm_runtime.replies.reader import read, size_of
from rlm_runtime.rlm import compaction, window
from rlm_runtime.rlm.conversation import Conversation, in_time, parser
from rlm_runtime.rlm.history import History
from rlm_runtime.rlm.repeats import Repeats
from rlm_runtime.rlm.results import ANSWERED, CANCELLED, ERROR, TURNS, Ending, at_limit
from rlm_runtime.rlm.subcalls import Spawn, SubCalls, as_text
from rlm_runtime.rlm.tree import Meter, Tree
from rlm_runtime.structured import Shape
from rlm_runtime.tools import Tool
from rlm_runtime.trajectory import (
    Asked,
    CellEnd,
    CellStart,
    ContextLoaded,
    Nudged,
    Replied,
    SandboxUp,
)

if TYPE_CHECKING:
    from rlm_runtime import parsing

SPAWN_SECONDS = 0.005  # until the worker's process is on its way
SALVAGE_SECONDS = 5.0  # to look at `answer` after an interrupted cell


class Node(Conversation):
    """A conversation that runs turns until its answer is ready.

    `best` is the content `answer` had last, ready or not.
    """

    def __init__(
        self,
        tree: Tree,
        environment: Environment,
        spawn: Spawn,
        *,
        id: str = "0",
        depth: int = 0,
        lm: LM,
        tools: Mapping[str, Tool],
        meter: Meter,
        question: str | None = None,
        shape: Shape | None = None,
        history: History | None = None,
    ):
        super().__init__(
            tree,
            environment,
            id=id,
            depth=depth,
            lm=lm,
            tools=tools,
            meter=meter,
            question=question,
            shape=shape,
            history=history,
        )
        self.calls = SubCalls(self, spawn)
        self.errors = 0  # failed cells and unusable replies in a row
        self.best: Any = None
        self.last_text = ""
        self.interrupted = False  # a cell was running when the loop was stopped
        self._recorded = False  # the record has the history that this run began with
        self._asked_for_none = self._asked_for_plan = False
        self._repeats = Repeats()
        self._noted = 0  # how many of the tree's notes this node was told

    # -- begin -------------------------------------------------------------------------------------
    async def start(self, context: Context) -> None:
        """Start the REPL with this context. Raises SandboxError."""
        began = time.monotonic()
        # the model's client is imported while the worker starts
        if warm := getattr(self.lm, "warm", None):
            asyncio.get_running_loop().call_later(SPAWN_SECONDS, in_time, warm)
        tools = tuple(t.info() for t in self.tools.values())
        record = asyncio.to_thread(self.tree.writer.context_fields, context, whole=self.is_root)
        # The record hashes a long text, and may store it.
        report, fields = await asyncio.gather(self.environment.start(context, tools), record)
        self.tree.emit(ContextLoaded(node=self.id, **fields))
        seconds = round(time.monotonic() - began, 6)
        # what a replay needs to cut outputs alike
        limits = self.tree.options.limits_for(self.lm).model_dump()
        up = {
            "environment": report.environment,
            "layers": report.layers,
            "start_seconds": seconds,
            "limits": limits,
        }
        self.tree.emit(SandboxUp(node=self.id, **up))

    # -- the loop ----------------------------------------------------------------------------------
    async def run(self) -> Ending:
        """Turns until the answer is ready or a limit is reached. Raises only CancelledError."""
        try:
            while True:
                limit = self.tree.ledger.budget.turns
                if limit is not None and self.turns >= limit:
                    return await self.last_call(TURNS, f"the limit of {limit} turns is reached.")
                ending = await self._turn()
                if ending is not None:
                    return ending
                if self._repeats.count >= (
                    self.tree.ledger.budget.repeats or self._repeats.count + 1
                ):
                    return await self.last_call(at_limit("repeats"), self._repeats.why)
                most = self.tree.ledger.budget.consecutive_errors
                if most is not None and self.errors >= most:
                    why = f"{self.errors} failed cells or unusable replies in a row."
                    return await self.last_call(at_limit("consecutive_errors"), why)
        except BudgetExceeded as e:
            self.tree.note_budget(self.id, self.turns, refused=e.limit)
            return await self.last_call(at_limit(e.limit), str(e))
        except RlmError as e:  # the model or the sandbox failed for good
            return await self._failed(e)

    async def _turn(self) -> Ending | None:
        """One reply and its cells. Raises BudgetExceeded, LMError, SandboxError."""
        reply = await self._ask_with_room()
        self.turn += 1
        self.turns += 1
        self.cell = 0
        parsed = await self._parsed(reply)
        self._answered(reply, parsed)
        report: list[CellResult] = []
        problem = None
        ending = None
        cells = parsed.cells
        for self.cell, code in enumerate(cells, 1):
            result = await self._cell(code)
            report.append(result)
            ending, problem = await self._finished(result)
            if ending is not None or problem is not None or result.status != "ok":
                break
        if problem is not None:
            await self.environment.reset_answer()
        usable = bool(cells)
        if not usable and parsed.final is not None and ending is None:
            ending, problem = await self._accept_text(
                parsed.kept if parsed.whole_json else parsed.final, parsed.final
            )
            usable = ending is not None
        nudges = (*parsed.nudges, *self._repeats.turn(parsed, report))
        for nudge in nudges if ending is None else ():
            self.tree.emit(
                Nudged(node=self.id, turn=self.turn, reason=nudge.reason, text=nudge.text)
            )
        if report:
            self.history.say(self.words.cell_report(report, skipped=len(cells) - len(report)))
            for result in report:
                self.errors = 0 if result.status == "ok" else self.errors + 1
        if not usable or problem is not None:
            self.errors += 1
        if problem is not None:
            self.history.say(problem)
        self.history.say(prompts.nudged(n.text for n in nudges))
        if ending is None:
            for note in self.tree.notes[self._noted :]:
                self.history.say(note)
            self._noted = len(self.tree.notes)
            if left := self.tree.ledger.running_low():
                self.history.say(prompts.remaining(left))
            self.history.say(self.words.turn(self.turn + 1, self.tree.ledger.budget.turns))
        self.tree.note_budget(self.id, self.turns)
        return ending

    async def _cell(self, code: str, *, calls: bool = True) -> CellResult:
        place = {"node": self.id, "turn": self.turn, "cell": self.cell}
        self.tree.emit(CellStart(**place, code=code))
        self.interrupted = True
        result = await self.environment.run(code, self.calls if calls else _refuse)
        self.interrupted = False
        self.tree.emit(CellEnd(**place, result=result))
        self._look(result)
        return result

    def _look(self, result: CellResult) -> None:
        if result.answer.content is not None:
            self.best = result.answer.content

    async def _parsed(self, reply: Reply) -> parsing.Parsed:
        size = len(reply.text) + sum(size_of(call.arguments) for call in reply.tool_calls)
        return await read(size, parser().parse, reply, tools=self.tools)

    async def _finished(self, result: CellResult) -> tuple[Ending | None, str | None]:
        """The ending where the answer is ready and good, or what to tell the model where it is
        not."""
        if not result.answer.ready:
            return None, None
        return await self._accept(result.answer.content)

    async def _accept(self, content: Any) -> tuple[Ending | None, str | None]:
        if self._is_plan(content):
            return None, prompts.plan_not_answer()
        if self.shape is None:
            if content is None and not self._asked_for_none:
                self._asked_for_none = True  # once: a model that means it says so again
                return None, prompts.empty_answer()
            return Ending(ANSWERED, answer=content, text=await _text(content)), None
        value, problem = await read(size_of(content), self.shape.check, content)
        if problem is not None:
            return None, self._refused(problem)
        return Ending(ANSWERED, answer=value, text=await _text(content)), None

    def _is_plan(self, content: Any) -> bool:
        """Whether an answer in the first reply only says what its model is about to do. Told once:
        a model that means it says so again."""
        if self.turn > 1 or self._asked_for_plan or not parser().is_plan(content):
            return False
        self._asked_for_plan = True
        return True

    async def _accept_text(self, *readings: str) -> tuple[Ending | None, str | None]:
        """An answer given as text outside a cell; with a shape, the first reading that fits it."""
        if self._is_plan(readings[-1]):
            return None, prompts.plan_not_answer()
        if self.shape is None:
            return Ending(ANSWERED, answer=readings[-1], text=readings[-1]), None
        problem: str | None = ""
        for text in readings:
            value, problem = await read(len(text), self.shape.read, text)
            if problem is None:
                return Ending(ANSWERED, answer=value, text=text), None
        return None, self._refused(problem or "")

    def _refused(self, problem: str) -> str:
        return prompts.answer_refused(
            problem, self.shape.describe() if self.shape is not None else ""
        )

    # -- asking ------------------------------------------------------------------------------------
    async def _ask_with_room(self) -> Reply:
        """The next reply; the history is compacted first where the window is nearly full, and once
        where the endpoint says that it is too full."""
        if compaction.due(self):
            await compaction.compact(self)
        try:
            return await self._ask(self.turn + 1)
        except LMError as e:
            if e.kind != "context_overflow" or not compaction.possible(self):
                raise
            await compaction.compact(self)
            return await self._ask(self.turn + 1)

    async def _ask(self, turn: int, *, last: bool = False) -> Reply:
        """Send what is unsent. The caller enters the reply with `_answered`."""
        fitted = window.fit(self)
        pending = self.history.pending()
        new = tuple(self._new_messages(pending))
        self.tree.emit(Asked(node=self.id, turn=turn, messages=new, left_out=fitted.left_out))
        return await self.call(fitted.messages, last=last)

    def _new_messages(self, pending: list[Message]) -> list[Message]:
        """What the record does not have yet: everything with the first call of a run, later only
        what is added."""
        if self._recorded:
            return pending
        self._recorded = True
        return [*self.history.messages, *pending]

    def _answered(self, reply: Reply, parsed: parsing.Parsed) -> None:
        """Enter a reply into history and record."""
        parsing = parser()
        kept = Message(role="assistant", content=parsed.kept)
        self.history.answered(self.history.pending(), kept, self.lm, reply.usage.input_tokens)
        # prose; code on the way to an answer is none
        if parsed.kept != parsing.EMPTY and not parsed.cells:
            self.last_text = parsed.kept
        self.tree.emit(
            Replied(
                node=self.id,
                turn=self.turn,
                message=kept,
                raw=reply.text if reply.text != parsed.kept else None,
                discarded=parsed.discarded,
                usage=reply.usage,
                seconds=round(time.monotonic() - self.began, 6),
                finish_reason=reply.finish_reason,
            )
        )

    # -- the end -----------------------------------------------------------------------------------
    async def last_call(self, reason: str, why: str, *, seconds: float | None = None) -> Ending:
        """Ask once more, for the best answer there is, and take what comes; else the best there
        was."""
        self.history.say(
            prompts.last_call(why, shape=self.shape.describe() if self.shape else None)
        )
        seconds = seconds or self.tree.ledger.budget.last_call_seconds
        trouble = None
        try:
            async with asyncio.timeout(seconds):
                for _ in range(2 if self.shape else 1):  # a wrong type is told once
                    ending, problem = await self._last_reply(reason, why)
                    if ending is not None:
                        return ending
                    trouble = problem
                    self.history.say(problem)
        except (RlmError, TimeoutError) as e:
            trouble = str(e) or f"the last call took more than {seconds:g} s."
        return await self.salvaged(reason, why if trouble is None else f"{why} {trouble}")

    async def _last_reply(self, reason: str, why: str) -> tuple[Ending | None, str]:
        self.turn += 1
        self.cell = 0
        reply = await self._ask(self.turn, last=True)
        parsing = parser()
        parsed = await self._parsed(reply)
        self._answered(reply, parsed)
        found: Any = (
            parsed.kept
            if parsed.final is None or (parsed.whole_json and self.shape)
            else parsed.final
        )
        if parsed.cells or found == parsing.EMPTY:
            found = None
        # models that finish in code do so here, too
        for self.cell, code in enumerate(parsed.cells, 1):
            result = await self._cell(code, calls=False)
            if result.answer.ready:
                found = result.answer.content
                break
        if found is None or found == "":
            found = self.best
        if found is None:
            return None, "The last reply held no answer."
        if self.shape is None:
            return Ending(
                reason, answer=found, text=await _text(found), partial=True, error=why
            ), ""
        value, problem = await read(size_of(found), self.shape.read, found)
        if problem is None:
            return Ending(
                reason, answer=value, text=await _text(found), partial=True, error=why
            ), ""
        return None, self.shape.complaint(problem)

    async def salvaged(self, reason: str, why: str, cause: Exception | None = None) -> Ending:
        """The best there is without asking: what `answer` held, else the last reply in prose. A run
        that was cancelled was not asked to come to an end, so what it said last is no answer."""
        found = (
            self.best if self.best is not None or reason == CANCELLED else (self.last_text or None)
        )
        if self.shape is None or found is None:
            return Ending(
                reason, answer=found, text=await _text(found), partial=True, error=why, cause=cause
            )
        value, problem = await read(size_of(found), self.shape.read, found)
        if problem is not None:
            why = f"{why} No answer fitted the schema: {problem}"
        return Ending(
            reason, answer=value, text=await _text(found), partial=True, error=why, cause=cause
        )

    async def _failed(self, error: RlmError) -> Ending:
        """The model or the sandbox is gone. An answer in the making is returned; else the error is
        the result."""
        kind = error.kind if isinstance(error, LMError) else type(error).__name__
        salvaged = await self.salvaged(
            ERROR, str(error), cause=None if self.best is not None else error
        )
        return replace(salvaged, kind=kind)

    async def look_again(self) -> Ending | None:
        """After an interrupted cell: the answer it may have finished, or at least its content in
        `best`. Bounded in time; a REPL that does not answer any more has nothing to say."""
        if not self.interrupted:
            return None
        self.interrupted = False
        with contextlib.suppress(Exception):
            async with asyncio.timeout(SALVAGE_SECONDS):
                result = await self.environment.run("pass", _refuse)
                self._look(result)
                return (await self._finished(result))[0]
        return None


async def _refuse(request: Request) -> list[Outcome]:
    refused = Outcome(
        error="the run is ending: no more calls; answer from what you have.", kind="budget"
    )
    return [refused] * (1 if request.method == "tool" else len(request.prompts))


async def _text(content: Any) -> str:
    return "" if content is None else await read(size_of(content), as_text, content)
