"""Running a recorded run's cells again, against the recorded outcomes of its calls, and comparing
what comes out.

No model is asked. Every cell of every RLM node runs in a fresh REPL with the recorded context; a
call a cell makes is answered with what the record holds for the same prompt in the same cell. The
replies are parsed again, too, and must give the recorded cells. What a cell takes from elsewhere
(clocks, addresses, random numbers without a seed) differs by nature; such differences are told
apart by their cause and can be left out.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from rlm_runtime.context import Context
from rlm_runtime.errors import ContextError, UsageError
from rlm_runtime.lms.base import Frozen, Message, Reply
from rlm_runtime.repl.base import CellResult, Environment, Limits, Outcome, Request, ToolInfo
from rlm_runtime.trajectory import (
    AnyEvent,
    Asked,
    CellEnd,
    CellStart,
    Compacted,
    ContextLoaded,
    NodeEnd,
    NodeStart,
    Replied,
    RunStart,
    SandboxUp,
    read,
)
from rlm_runtime.trajectory.writer import shorten

Cause = Literal["addresses", "numbers", "other"]
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{4,16}\b")
NUMBER = re.compile(r"\d+(?:[.:]\d+)*(?:[eE][+-]?\d+)?")
SHOWN = 400  # characters of each side of a difference


class Difference(Frozen):
    node: str
    turn: int
    cell: int = 0
    # stdout | stderr | status | error | answer | variables | calls | cells (of the reply)
    field: str
    recorded: str  # from shortly before the first difference, bounded
    replayed: str
    # addresses: equal but for 0x7f... · numbers: equal but for digits (times, random numbers)
    cause: Cause = "other"

    def line(self) -> str:
        place = f"node {self.node}, turn {self.turn}" + (f", cell {self.cell}" if self.cell else "")
        why = "" if self.cause == "other" else f" (only {self.cause} differ)"
        return f"{place}: {self.field}{why}: recorded {self.recorded!r}, now {self.replayed!r}"


class ReplayReport(Frozen):
    """`ok` where everything that was compared is the same."""

    cells: int = 0  # run and compared
    calls: int = 0  # answered from the record
    replies: int = 0  # parsed again
    nodes: int = 0
    differences: tuple[Difference, ...] = ()
    ignored: int = 0  # differences of a cause that was to be left out
    warnings: tuple[str, ...] = ()  # damaged lines, cells without an end

    @property
    def ok(self) -> bool:
        return not self.differences

    def line(self) -> str:
        """One line for a terminal."""
        same = "all the same" if self.ok else f"{len(self.differences)} differences"
        left = f", {self.ignored} left out" if self.ignored else ""
        return f"{self.cells} cells, {self.calls} calls and {self.replies} replies of {self.nodes} nodes: {same}{left}"


def replay(
    path: Path | str,
    *,
    context: Path | str | None = None,
    ignore: Collection[Cause] = (),
    environment: str | Callable[[Limits], Environment] = "local",
    limits: Limits | None = None,
    children: bool = True,
    on_cell: Callable[[CellStart, bool], None] | None = None,
) -> ReplayReport:
    """Replay the run at `path` (a folder or its events file); see `areplay`."""
    return asyncio.run(
        areplay(
            path,
            context=context,
            ignore=ignore,
            environment=environment,
            limits=limits,
            children=children,
            on_cell=on_cell,
        )
    )


async def areplay(
    path: Path | str,
    *,
    context: Path | str | None = None,
    ignore: Collection[Cause] = (),
    environment: str | Callable[[Limits], Environment] = "local",
    limits: Limits | None = None,
    children: bool = True,
    on_cell: Callable[[CellStart, bool], None] | None = None,
) -> ReplayReport:
    """Replay a run. `context` is where a context file lies now, if it has been moved; `limits`
    bounds each REPL, and what the record says may only lower it; `children=False` takes the
    recorded outcome of child RLMs without running their cells; `on_cell` is told each cell and
    whether it was the same.

    Raises UsageError (no trajectory there, or nothing in it to replay), ContextError (the context
    is gone or has changed), SandboxError (no worker).
    """
    trajectory = read(path)
    record = _Record.of(trajectory)
    if not record.nodes:
        raise UsageError(
            f"{trajectory.path}: no cell was run in this run, so there is nothing to replay."
        )
    replayed = _Replay(
        record=record,
        blobs=trajectory.path.parent / "blobs",  # type: ignore[union-attr]
        moved=Path(context) if context is not None else None,
        ignore=frozenset(ignore),
        make=environment if callable(environment) else _maker(environment, record.settings),
        on_cell=on_cell,
        limits=limits or Limits(),
        warnings=list(trajectory.warnings),
    )
    for node in sorted(record.nodes, key=lambda n: (n != "0", n)):
        if node == "0" or children:
            await replayed.node(node)
    return ReplayReport(
        cells=replayed.cells,
        calls=replayed.calls,
        replies=replayed.replies,
        nodes=replayed.nodes_done,
        differences=tuple(replayed.differences),
        ignored=replayed.ignored,
        warnings=tuple(replayed.warnings),
    )


def _maker(kind: str, settings: dict[str, Any]) -> Callable[[Limits], Environment]:
    from rlm_runtime import repl

    packages = settings.get("packages") or ()
    named = (
        tuple(name for name in packages if isinstance(name, str))
        if isinstance(packages, list)
        else ()
    )
    return lambda limits: repl.make(kind, limits, packages=named)


CellKey = tuple[int, str, int, int]  # completion of the session, node, turn, cell


@dataclass
class _Record:
    """A trajectory in the order in which a replay needs it."""

    # of RLM nodes with cells: events, with the completion they belong to
    nodes: dict[str, list[tuple[int, AnyEvent]]]
    starts: dict[CellKey, list[NodeStart]]  # calls a cell made, in their order
    ends: dict[tuple[int, str], NodeEnd]
    ended: dict[CellKey, CellEnd]
    settings: dict[str, Any]

    @classmethod
    def of(cls, events: list[AnyEvent]) -> _Record:
        record = cls(defaultdict(list), defaultdict(list), {}, {}, {})
        # a session's completions follow each other in one file, each numbering its calls anew
        completion = -1
        for event in events:
            if isinstance(event, RunStart) and event.node == "0":
                completion += 1
                record.settings = record.settings or event.settings
            if isinstance(event, NodeStart):
                record.starts[completion, event.parent, event.turn, event.cell].append(event)
            elif isinstance(event, NodeEnd):
                record.ends[completion, event.node] = event
            else:
                if isinstance(event, CellEnd):
                    record.ended[completion, event.node, event.turn, event.cell] = event
                name = event.node if event.node == "0" else f"{event.node}@{completion}"
                record.nodes[name].append((completion, event))
        for calls in record.starts.values():
            calls.sort(key=lambda c: _number(c.node))
        kept = {
            n: e for n, e in record.nodes.items() if any(isinstance(x, CellStart) for _, x in e)
        }
        record.nodes = kept
        return record

    def tools(self, root: bool) -> tuple[ToolInfo, ...]:
        """The tools of a node, by name; values where the record has them."""
        names = self.settings.get("tools" if root else "sub_tools") or ()
        values = self.settings.get("tool_values") or {}
        return tuple(
            ToolInfo(name=n, value=values.get(n), is_value=n in values)
            for n in names
            if isinstance(n, str)
        )


def _number(node: str) -> int:
    last = node.rpartition(".")[2]
    return int(last) if last.isdigit() else 0


@dataclass
class _Replay:
    record: _Record
    blobs: Path
    moved: Path | None
    ignore: frozenset[Cause]
    make: Callable[[Limits], Environment]
    on_cell: Callable[[CellStart, bool], None] | None
    limits: Limits
    warnings: list[str]
    differences: list[Difference] = field(default_factory=list)
    cells: int = 0
    calls: int = 0
    replies: int = 0
    nodes_done: int = 0
    ignored: int = 0

    async def node(self, name: str) -> None:
        """Run one node's cells in order, in one REPL."""
        events = self.record.nodes[name]
        history = _History()
        environment = self.make(self._limits(events))
        tools = self.record.tools(root=name == "0")
        self.nodes_done += 1
        started = after_ready = False
        try:
            for at, (completion, event) in enumerate(events):
                match event:
                    case RunStart():
                        history.begin(completion)
                    case ContextLoaded() if (
                        event.blob is None and event.path is None and event.node != "0"
                    ):
                        self.warnings.append(
                            f"node {event.node}: its context was too large to record; it was not run"
                        )
                        self.nodes_done -= 1
                        return
                    case ContextLoaded() if not started:
                        await environment.start(self._context(event), tools)
                        started = True
                    case ContextLoaded():
                        await environment.rebind_context(self._context(event), event.name)
                        await environment.reset_answer()
                        after_ready = False
                    case Asked():
                        history.asked(event.messages)
                    case Replied():
                        history.replied(event.message)
                        self._parse(event, [e for _, e in events[at + 1 :]], tools)
                    case Compacted():
                        await environment.bind("history", history.compact())
                    case CellStart():
                        if not started:
                            raise UsageError(
                                f"node {event.node}: a cell ran before the context was recorded."
                            )
                        # a ready answer that did not end the node was refused, and taken back
                        if after_ready:
                            await environment.reset_answer()
                        after_ready = await self._cell(environment, completion, event)
        finally:
            await environment.aclose()

    def _limits(self, events: list[tuple[int, AnyEvent]]) -> Limits:
        own = next((e.limits for _, e in events if isinstance(e, SandboxUp) and e.limits), None)
        try:
            recorded = Limits(**(own or self.record.settings.get("limits") or {}))
        except ValidationError as error:
            self.warnings.append(
                f"the recorded limits are not used: {error.error_count()} of them are unknown or wrong"
            )
            return self.limits
        return self.limits.model_copy(update=dict(self._lowered(recorded)))

    def _lowered(self, recorded: Limits) -> Iterator[tuple[str, float]]:
        """The recorded limits that are below those of this replay: a record is somebody's file and
        grants nothing."""
        for name, allowed in self.limits:
            value = getattr(recorded, name)
            if 0 < value <= allowed:
                yield name, value
            elif (
                note
                := f"the recorded limit {name}={value:g} is not used: this replay allows {allowed:g}"
            ) not in (self.warnings):
                self.warnings.append(note)

    def _context(self, event: ContextLoaded) -> Context:
        if self.moved is not None and event.node == "0" and event.name == "context":
            context = Context.from_record(
                {**event.model_dump(), "blob": None, "path": str(self.moved), "sha256": None}, None
            )
            if event.sha256 is not None and context.sha256 != event.sha256:
                raise ContextError(
                    f"context: {self.moved} is not what the recorded run read (its hash differs)."
                )
            return context
        return Context.from_record(event.model_dump(), self.blobs)

    async def _cell(self, environment: Environment, completion: int, start: CellStart) -> bool:
        """Run and compare one cell; returns whether its recorded answer was ready."""
        key = (completion, start.node, start.turn, start.cell)
        ended = self.record.ended.get(key)
        if ended is None:
            self.warnings.append(
                f"node {start.node}, turn {start.turn}: the cell has no recorded end; it was not run"
            )
            return False
        answers = _Answers(self.record, key)
        result = await environment.run(start.code, answers)
        self.cells += 1
        self.calls += answers.given
        before = len(self.differences)
        for name, old, new in _compared(ended.result, result):
            self._differ(start, name, old, new)
        for missing in answers.left():
            self._differ(start, "calls", f"{missing.node}: {missing.prompt[:SHOWN]}", "(not made)")
        for extra in answers.unknown:
            self._differ(start, "calls", "(not made)", extra)
        if self.on_cell is not None:
            self.on_cell(start, len(self.differences) == before)
        return ended.result.answer.ready

    def _differ(self, start: CellStart | Replied, name: str, old: str, new: str) -> None:
        cause = _cause(old, new)
        if cause in self.ignore:
            self.ignored += 1
            return
        first = next(
            (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
            min(len(old), len(new)),
        )
        cut = slice(max(0, first - 40), first + SHOWN)
        place = {"node": start.node, "turn": start.turn, "cell": getattr(start, "cell", 0)}
        self.differences.append(
            Difference(**place, field=name, recorded=old[cut], replayed=new[cut], cause=cause)
        )

    def _parse(self, reply: Replied, later: list[AnyEvent], tools: tuple[ToolInfo, ...]) -> None:
        """The reply must still give the cells that were run; a cell that failed or answered ends
        its turn early."""
        from rlm_runtime import parsing

        run = []
        for event in later:
            if isinstance(event, Replied | Asked | RunStart):
                break
            if isinstance(event, CellStart):
                run.append(event.code)
        names = [t.name for t in tools]
        raw = reply.raw if reply.raw is not None else reply.message.content
        # Native tool calls are in the record only as the history has them: as blocks of code.
        for text, calls in ((raw, reply.message.tool_calls), (reply.message.content, ())):
            parsed = parsing.parse(
                Reply(text=text, tool_calls=calls, finish_reason=reply.finish_reason), tools=names
            )
            if list(parsed.cells[: len(run)]) == run and (run or not parsed.cells):
                break
        else:
            self._differ(
                reply, "cells", "\n\n".join(run) or "(none)", "\n\n".join(parsed.cells) or "(none)"
            )
        self.replies += 1


class _Answers:
    """The handler of a cell's calls: the first recorded call of this cell with the same prompt that
    is not used yet."""

    def __init__(self, record: _Record, key: CellKey):
        self._ends = record.ends
        self._completion = key[0]
        self._waiting: dict[tuple[str, str, str | None], deque[NodeStart]] = defaultdict(deque)
        recorded = record.starts.get(key, [])
        for start in recorded:
            name = start.model if start.kind == "tool" else ""
            self._waiting[name, start.prompt, start.question].append(start)
        self._none = not recorded
        self.given = 0
        self.unknown: list[str] = []

    async def __call__(self, request: Request) -> list[Outcome]:
        from rlm_runtime.rlm.subcalls import as_text

        if request.method == "tool":
            arguments = as_text({"args": list(request.args), "kwargs": request.kwargs})
            return [await self._outcome(request, (request.name or "", arguments, None))]
        question = request.question if request.method == "rlm" else None
        return [
            await self._outcome(request, ("", as_text(prompt), question))
            for prompt in request.prompts
        ]

    async def _outcome(self, request: Request, key: tuple[str, str, str | None]) -> Outcome:
        if not self._waiting[key]:
            key = (key[0], shorten(key[1]), key[2])
        if not self._waiting[key]:
            if self._none:  # the cells of a last call ask in vain; only then is nothing recorded
                from rlm_runtime.rlm.loop import _refuse

                return (await _refuse(request))[0]
            self.unknown.append(key[1][:SHOWN])
            return Outcome(error="the recorded run did not make this call", kind="refused")
        start = self._waiting[key].popleft()
        self.given += 1
        end = self._ends.get((self._completion, start.node))
        if end is None:
            return Outcome(error="the record ends before this call did", kind="cancelled")
        return Outcome(value=end.value, error=end.error, kind=end.kind)

    def left(self) -> Iterator[NodeStart]:
        for waiting in self._waiting.values():
            yield from waiting


class _History:
    """What the node's conversation archived when it was compacted, from the messages in the
    record."""

    def __init__(self) -> None:
        self.archive: list[dict[str, str]] = []
        self._since: list[Message] = []
        self._pending: tuple[Message, ...] = ()
        self._repeats = False

    def begin(self, completion: int) -> None:
        """A session's later completion repeats the whole history with its first call; its last
        message is new."""
        self._repeats = completion > 0

    def asked(self, messages: tuple[Message, ...]) -> None:
        self._pending = messages[-1:] if self._repeats else messages
        self._repeats = False

    def replied(self, message: Message) -> None:
        self._since += [*self._pending, message]
        self._pending = ()

    def compact(self) -> list[dict[str, str]]:
        self.archive += [{"role": m.role, "content": m.content} for m in self._since]
        self._since = []
        return self.archive


def _compared(old: CellResult, new: CellResult) -> list[tuple[str, str, str]]:
    """What differs between a recorded result, whose long texts may be cut, and one of now."""
    found = list(_differences(old, new))
    if found:
        found = list(
            _differences(
                old, CellResult.model_validate(shorten(to_jsonable_python(new, fallback=repr)))
            )
        )
    return found


def _differences(old: CellResult, new: CellResult) -> Iterator[tuple[str, str, str]]:
    """What differs between two results, each side as text. How long a cell took is not compared."""
    for name in ("status", "stdout", "stderr"):
        if getattr(old, name) != getattr(new, name):
            yield name, getattr(old, name), getattr(new, name)
    errors = [
        "" if r.error is None else f"{r.error.type}: {r.error.message}\n{r.error.traceback}"
        for r in (old, new)
    ]
    if errors[0] != errors[1]:
        yield "error", errors[0], errors[1]
    answers = [r.answer.model_dump() for r in (old, new)]
    if answers[0] != answers[1]:
        yield "answer", _text(answers[0]), _text(answers[1])
    if old.variables != new.variables:
        names = sorted(
            k
            for k in old.variables.keys() | new.variables
            if old.variables.get(k) != new.variables.get(k)
        )
        before, after = (
            "; ".join(f"{k}: {v.get(k, '(none)')}" for k in names)
            for v in (old.variables, new.variables)
        )
        yield "variables", before, after


def _text(value: Any) -> str:
    import json

    return json.dumps(to_jsonable_python(value, fallback=repr), ensure_ascii=True, sort_keys=True)


def _cause(old: str, new: str) -> Cause:
    old, new = ADDRESS.sub("0x", old), ADDRESS.sub("0x", new)
    if old == new:
        return "addresses"
    return "numbers" if NUMBER.sub("0", old) == NUMBER.sub("0", new) else "other"
