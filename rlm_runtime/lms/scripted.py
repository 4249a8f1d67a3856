"""A language model that says what a test tells it to. For tests and benchmarks only: `resolve` does
not know it."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rlm_runtime.errors import LMError
from rlm_runtime.lms.base import DEFAULT_SAMPLING, Message, Reply, Sampling, ToolSpec, Usage

Line = str | Reply | BaseException
Script = Sequence[Line] | Callable[..., Any]


class ScriptedLM:
    """Answers from a script: a list of replies in order, or a function of the messages.

    Args:
      script: a list whose k-th entry answers the k-th call (after the last one: LMError naming the
        count, or the last entry again with `repeat_last`), or a function (or coroutine function) of
        the messages. A reply is a str, a `Reply`, or an exception to raise. A function that takes
        `sampling`, `tools` or `schema` is given them.
      latency: seconds a call takes; a number, or a function of the messages.
      chunk: `on_text` gets pieces of this many characters.
      usd_per_token: price of every token; None: no known price.
      tokens: how many tokens a text has; default: one for four characters, rounded up.

    Afterwards `calls` holds one `ScriptedCall` for each call in the order they came,
    `max_concurrency` how many were in flight at once at most, `cancelled` how many were cancelled
    while they waited.
    """

    def __init__(
        self,
        script: Script,
        *,
        latency: float | Callable[[Sequence[Message]], float] = 0.0,
        name: str = "scripted",
        window: int | None = None,
        usd_per_token: float | None = None,
        chunk: int = 16,
        repeat_last: bool = False,
        tokens: Callable[[str], int] | None = None,
    ):
        self.name, self.window = name, window
        self.calls: list[ScriptedCall] = []
        self.active = self.max_concurrency = self.cancelled = 0
        self.closed = False
        self._script = script if callable(script) else list(script)
        self._latency, self._usd, self._chunk, self._repeat_last = (
            latency,
            usd_per_token,
            chunk,
            repeat_last,
        )
        self._tokens = tokens or (lambda text: math.ceil(len(text) / 4))
        self._lock = threading.Lock()  # a test may drive one LM from several event loops
        self._wanted = _keywords(script) if callable(script) else frozenset()

    @property
    def count(self) -> int:
        return len(self.calls)

    @property
    def messages(self) -> list[tuple[Message, ...]]:
        """The messages of each call."""
        return [call.messages for call in self.calls]

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """The script's next reply. Raises what the script holds in its place; LMError when it has
        run out."""
        call = ScriptedCall(tuple(messages), sampling, tuple(tools), schema)
        with self._lock:
            index = len(self.calls)
            self.calls.append(call)
            self.active += 1
            self.max_concurrency = max(self.max_concurrency, self.active)
        try:
            seconds = self._latency(messages) if callable(self._latency) else self._latency
            if seconds:
                await asyncio.sleep(seconds)
            line = self._line(index, call)
            if inspect.isawaitable(line):
                line = await line
        except asyncio.CancelledError:
            with self._lock:
                self.cancelled += 1
            raise
        finally:
            with self._lock:
                self.active -= 1
        if isinstance(line, BaseException):
            raise line
        reply = line if isinstance(line, Reply) else Reply(text=line)
        if reply.usage == Usage():
            reply = reply.model_copy(update={"usage": self._usage(messages, reply)})
        if not reply.model:
            reply = reply.model_copy(update={"model": self.name})
        if on_text:
            for start in range(0, len(reply.text), self._chunk):
                on_text(reply.text[start : start + self._chunk])
        return reply

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(self._tokens(m.content) for m in messages)

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float | None:
        return None if self._usd is None else self._usd * (input_tokens + output_tokens)

    async def aclose(self) -> None:
        self.closed = True

    def __repr__(self) -> str:
        return f"ScriptedLM({self.name!r}, calls={self.count})"

    def _line(self, index: int, call: ScriptedCall) -> Any:
        if callable(self._script):
            given = {"sampling": call.sampling, "tools": call.tools, "schema": call.schema}
            return self._script(
                call.messages, **{k: v for k, v in given.items() if k in self._wanted}
            )
        if index < len(self._script):
            return self._script[index]
        if self._repeat_last and self._script:
            return self._script[-1]
        raise LMError(
            f"{self.name}: the script has {len(self._script)} replies; this was call {index + 1}.",
            kind="protocol",
            model=self.name,
        )

    def _usage(self, messages: Sequence[Message], reply: Reply) -> Usage:
        spent = self.count_tokens(messages), self._tokens(reply.text)
        return Usage(
            calls=1, input_tokens=spent[0], output_tokens=spent[1], cost_usd=self.price(*spent)
        )


class ScriptedCall:
    """What one call was asked with."""

    __slots__ = ("messages", "sampling", "schema", "tools")

    def __init__(
        self,
        messages: tuple[Message, ...],
        sampling: Sampling,
        tools: tuple[ToolSpec, ...],
        schema: Any,
    ):
        self.messages, self.sampling, self.tools, self.schema = messages, sampling, tools, schema

    @property
    def text(self) -> str:
        """The last message."""
        return self.messages[-1].content if self.messages else ""

    def __repr__(self) -> str:
        return f"Call({len(self.messages)} messages, last {self.text[:60]!r})"


def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return frozenset({"sampling", "tools", "schema"})
    return frozenset(p.name for p in parameters) & {"sampling", "tools", "schema"}
