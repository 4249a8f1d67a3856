"""What a REPL asks of the host: sub-LM calls, child RLMs, tools. Every failure is a value in its
place."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from rlm_runtime import prompts
from rlm_runtime.errors import LMError, RlmError, UsageError
from rlm_runtime.lms.base import LM, Message, Reply, ToolCall, with_ids
from rlm_runtime.repl.base import Outcome, Request
from rlm_runtime.replies import pieces
from rlm_runtime.replies.reader import read, size_of
from rlm_runtime.replies.thinking import clean
from rlm_runtime.rlm import blanks, schemas
from rlm_runtime.rlm.conversation import Conversation
from rlm_runtime.rlm.tree import Meter, in_order, why_not
from rlm_runtime.structured import Shape
from rlm_runtime.tools import Tool, ToolError
from rlm_runtime.trajectory import NodeEnd, NodeStart

# Runs a child RLM: parent, id, meter, prompt, question, shape of the answer.
Spawn = Callable[[Conversation, str, Meter, Any, str | None, Shape | None], Awaitable[Outcome]]


class SubCalls:
    """Answers the requests of one node's REPL (the `Handler` of its environment). Never raises."""

    def __init__(self, node: Conversation, spawn: Spawn):
        self.node, self.tree, self._spawn = node, node.tree, spawn
        self._made = 0
        self._noted: set[tuple[int, str]] = set()

    def next_id(self) -> str:
        self._made += 1
        return f"{self.node.id}.{self._made}"

    async def __call__(self, request: Request) -> list[Outcome]:
        with self.tree.request():
            if request.method == "tool":
                return [await self._tool(self.next_id(), request)]
            shape = await _shape_or_error(request.schema_)
            first, self._made = self._made + 1, self._made + len(request.prompts)
            calls = await read(size_of(request.prompts), self._listed, request, shape, first)
            child = request.method == "rlm" and self.node.depth + 1 < self.tree.options.max_depth
            width = self.tree.options.max_repls if child else self.tree.options.concurrency
            if child or self._draws():
                return await in_order(
                    self._child if child else self._plain, calls, width, self.tree.pace
                )
            return await self._once_each(calls, width)

    def _listed(
        self, request: Request, shape: Shape | UsageError | None, first: int
    ) -> list[tuple[Any, ...]]:
        """The calls of a request, numbered from `first` on."""
        node = self.node.id
        return [
            (f"{node}.{number}", Prompt.of(prompt), request, shape)
            for number, prompt in enumerate(request.prompts, first)
        ]

    def _draws(self) -> bool:
        """Whether equal prompts are meant to give different replies: a temperature was asked
        for."""
        return bool(self.tree.options.sub_sampling.temperature)

    async def _once_each(self, calls: list[tuple[Any, ...]], width: int) -> list[Outcome]:
        """Equal prompts of a batch are asked once; the others are recorded with the outcome of the
        first."""
        if len(calls) == 1:
            return [await self._plain(*calls[0])]
        keys = [prompt.text for _, prompt, _, _ in calls]
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        asked = list(first.values())
        found = dict(
            zip(
                asked,
                await in_order(self._plain, [calls[i] for i in asked], width, self.tree.pace),
                strict=True,
            )
        )
        for i, (id, prompt, request, _) in enumerate(calls):
            if i not in found:
                found[i] = await self._again(id, prompt, request, found[first[keys[i]]])
                await self.tree.pace.step()
        return [found[i] for i in range(len(calls))]

    async def _again(self, id: str, prompt: Prompt, request: Request, outcome: Outcome) -> Outcome:
        async def work() -> Outcome:
            return outcome

        question = request.question if request.method == "rlm" else None
        lm_name = request.model or self.tree.options.call_lm(self.node.depth + 1).name
        return await self._recorded(id, "lm", lm_name, prompt.text, question, Meter(), work)

    # -- one call ----------------------------------------------------------------------------------
    async def _plain(
        self, id: str, prompt: Prompt, request: Request, shape: Shape | UsageError | None
    ) -> Outcome:
        """A sub-LM call, with its own small tool loop where there are `sub_tools`."""
        question = request.question if request.method == "rlm" else None
        options = self.tree.options
        depth = self.node.depth + 1
        meter = Meter(self.node.meter)

        async def work() -> Outcome:
            if options.max_depth < 1:
                raise UsageError(
                    "sub-calls are switched off in this run (max_depth=0); work in Python alone."
                )
            self.tree.ledger.check_depth(depth)
            lm = options.call_lm(depth, request.model)
            if isinstance(shape, UsageError):
                raise shape
            messages = self._opened(prompt.messages(question))
            return Outcome(value=await self._converse(id, lm, messages, depth, meter, shape))

        lm_name = request.model or options.call_lm(depth).name
        return await self._recorded(id, "lm", lm_name, prompt.text, question, meter, work)

    async def _child(
        self, id: str, prompt: Prompt, request: Request, shape: Shape | UsageError | None
    ) -> Outcome:
        meter = Meter(self.node.meter)
        name = self.tree.options.node_lm(self.node.depth + 1).name

        async def work() -> Outcome:
            self.tree.ledger.check_depth(self.node.depth + 1)
            if isinstance(shape, UsageError):
                raise shape
            self.tree.ledger.count_call()
            return await self._spawn(self.node, id, meter, prompt.value, request.question, shape)

        return await self._recorded(id, "rlm", name, prompt.text, request.question, meter, work)

    async def _tool(self, id: str, request: Request) -> Outcome:
        async def work() -> Outcome:
            tool = self.node.tools.get(request.name or "")
            if tool is None or tool.is_value:
                raise UsageError(f"there is no tool {request.name!r} here.")
            return await _outcome(tool.call(request.args, request.kwargs))

        given = {"args": list(request.args), "kwargs": request.kwargs}
        arguments = await read(size_of(given), as_text, given)
        return await self._recorded(id, "tool", request.name or "", arguments, None, Meter(), work)

    async def _recorded(
        self,
        id: str,
        kind: str,
        model: str,
        prompt: str,
        question: str | None,
        meter: Meter,
        work: Callable[[], Awaitable[Outcome]],
    ) -> Outcome:
        """Run one call between its NodeStart and NodeEnd; an error becomes an Outcome."""
        node, tree = self.node, self.tree
        tree.emit(
            NodeStart(
                node=id,
                parent=id.rpartition(".")[0],
                kind=kind,
                model=model,
                depth=id.count("."),
                turn=node.turn,
                cell=node.cell,
                prompt=prompt,
                question=question,
            )
        )
        began = time.monotonic()
        outcome = Outcome(error="the call was cancelled.", kind="cancelled")
        try:
            outcome = await work()
        except RlmError as e:
            message, error_kind = why_not(e)
            outcome = Outcome(error=message, kind=error_kind)
            limit = getattr(e, "limit", None)
            # once a turn, not once a call
            if limit is not None and (node.turn, limit) not in self._noted:
                self._noted.add((node.turn, limit))
                tree.note_budget(node.id, node.turns, refused=limit)
        except Exception as e:  # a bug of ours must not look like an answer, nor end the run
            outcome = Outcome(error=f"{type(e).__name__}: {e}", kind="internal")
        finally:
            tree.emit(
                NodeEnd(
                    node=id,
                    value=outcome.value,
                    error=outcome.error,
                    kind=outcome.kind,
                    usage=meter.usage,
                    seconds=round(time.monotonic() - began, 6),
                )
            )
        return outcome

    # -- the conversation with a sub-LM ------------------------------------------------------------
    async def _converse(
        self,
        id: str,
        lm: LM,
        messages: list[Message],
        depth: int,
        meter: Meter,
        shape: Shape | None,
    ) -> Any:
        """Ask, run the tools it calls, ask again; hold the reply to the schema. Raises RlmError."""
        options = self.tree.options
        tools = {n: t for n, t in options.sub_tools.items() if not t.is_value}
        specs = [t.spec() for t in tools.values()]
        rounds, retries, made, tries = 0, 0, 0, 0
        sampling = options.sub_sampling
        while True:
            offered = specs if rounds < options.sub_rounds else []
            reply = await self.tree.ask(
                lm,
                messages,
                depth=depth,
                meter=meter,
                calls=1,
                sampling=sampling,
                tools=offered,
                schema=shape.schema if shape is not None else None,
            )
            if reply.tool_calls and offered:
                rounds += 1
                said = _assistant(reply)
                told = [
                    (f"{id}.{made + k}", call, tools) for k, call in enumerate(said.tool_calls, 1)
                ]
                made += len(told)
                results = await in_order(self._sub_tool, told, options.concurrency, self.tree.pace)
                messages = [*messages, said, *results]
                continue
            found = await read(len(reply.text), clean, reply.text)
            if not found.text.strip() and reply.tool_calls:
                raise LMError(
                    f"{lm.name} kept calling tools after {rounds} rounds.",
                    kind="protocol",
                    model=lm.name,
                )
            blank = blanks.no_answer(lm, reply, found.text)
            if blank is not None:
                tries += 1
                again = blanks.another_try(blank, sampling, tries)
                if again is None:
                    raise blank
                sampling = again
                continue
            if shape is None:
                return found.text
            value, problem = await read(len(found.text), shape.parse, found.text)
            if problem is None:
                return value
            if retries >= options.schema_retries:
                raise SchemaError(f"no reply fitted the schema in {retries + 1} tries: {problem}")
            retries += 1
            said = Message(role="assistant", content=found.text)
            messages = [*messages, said, Message(role="user", content=shape.complaint(problem))]

    def _opened(self, messages: list[Message]) -> list[Message]:
        """With a system message where one is wanted and the prompt does not bring its own."""
        options = self.tree.options
        text = options.sub_system_prompt or (
            prompts.sub_system(tools=True) if options.sub_tools else None
        )
        if text is None or messages[0].role == "system":
            return messages
        return [Message(role="system", content=text), *messages]

    async def _sub_tool(self, id: str, call: ToolCall, tools: dict[str, Tool]) -> Message:
        async def work() -> Outcome:
            tool = tools.get(call.name)
            if tool is None:
                raise UsageError(f"there is no tool {call.name!r}; there are: {', '.join(tools)}.")
            return await _outcome(tool.call_named(call.arguments))

        arguments = await read(size_of(call.arguments), as_text, call.arguments)
        outcome = await self._recorded(id, "tool", call.name, arguments, None, Meter(), work)
        text = (
            await read(size_of(outcome.value), as_text, outcome.value)
            if outcome.error is None
            else f"Error: {outcome.error}"
        )
        return Message(role="tool", content=text, tool_call_id=call.id)


class SchemaError(RlmError):
    """A sub-LM could not be brought to answer in the schema it was given."""

    kind = "schema"


async def _shape_or_error(schema: dict[str, Any] | None) -> Shape | UsageError | None:
    """Made once for a batch; an error is then the outcome of each of its calls."""
    try:
        return (
            await read(4 * size_of(schema), schemas.shape_of, schema)
            if schema is not None
            else None
        )
    except UsageError as e:
        return e


async def _outcome(call: Awaitable[Any]) -> Outcome:
    try:
        return Outcome(value=await call)
    except ToolError as e:
        return Outcome(error=str(e), kind="tool")


def _assistant(reply: Reply) -> Message:
    return Message(
        role="assistant",
        content=reply.text,
        tool_calls=with_ids(reply.tool_calls),
        extra=reply.extra,
    )


def as_text(value: Any) -> str:
    """A prompt or tool result as text: a str as it is, anything else as JSON. Lone surrogates,
    which no endpoint takes, become question marks."""
    if not isinstance(value, str):
        if size_of(value, pieces.PIECE + 1) > pieces.PIECE:
            # what is no JSON is written as `str` has it, as below
            with contextlib.suppress(TypeError):
                return pieces.dumps(value, pieces.WIDE).decode()
        value = json.dumps(value, ensure_ascii=False, default=str)
    return pieces.valid(value)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a cell asks with: a text or another JSON value, and the same as text."""

    value: Any
    text: str

    @classmethod
    def of(cls, value: Any) -> Prompt:
        return cls(value, as_text(value))

    def messages(self, question: str | None = None) -> list[Message]:
        """The conversation it stands for: a list of chat messages, else one user message; the
        question first."""
        messages = _chat(self.value)
        if messages is None:
            return [Message(role="user", content=prompts.sub_user(self.text, question))]
        return [*messages, Message(role="user", content=question)] if question else messages


def _chat(prompt: Any) -> list[Message] | None:
    if not isinstance(prompt, list) or not prompt:
        return None
    roles = ("system", "user", "assistant")
    if all(
        isinstance(m, dict)
        and set(m) == {"role", "content"}
        and m["role"] in roles
        and isinstance(m["content"], str)
        for m in prompt
    ):
        return [Message(role=m["role"], content=as_text(m["content"])) for m in prompt]
    return None
