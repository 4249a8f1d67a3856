"""What every language model looks like to the runtime: messages in, one reply out, usage counted.

A new kind of LM is one file with a class that has these members, and its name: `lms.register`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """Validators are built when a class is first used: building all of them would double the time
    an import takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class ToolCall(Frozen):
    """A call the model asks for. `arguments` is the parsed JSON object, or the raw text where it
    did not parse.

    `extra` is what else the endpoint sent with the call (a `thought_signature`); it goes back with
    it.
    """

    id: str
    name: str
    arguments: dict[str, Any] | str
    extra: dict[str, Any] = Field(default_factory=dict)


class ToolSpec(Frozen):
    """A tool as the model sees it; `parameters` is a JSON schema of an object."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class Message(Frozen):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant message
    tool_call_id: str | None = None  # of a tool message
    # `Reply.extra` of the reply this message repeats
    extra: dict[str, Any] = Field(default_factory=dict)


class Usage(Frozen):
    """Tokens and money of one call or a sum of calls; they add with `+`. `cost_usd` is None where
    no price is known."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # part of input_tokens
    cost_usd: float | None = None
    estimated: bool = False  # some of the tokens are an estimate: an endpoint sent no usage

    def __add__(self, other: Usage) -> Usage:
        costs = [c for c in (self.cost_usd, other.cost_usd) if c is not None]
        return Usage(
            calls=self.calls + other.calls,
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            cost_usd=sum(costs) if costs else None,
            estimated=self.estimated or other.estimated,
        )


class Reply(Frozen):
    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = Usage()
    finish_reason: str = "stop"  # stop | length | tool_calls | content_filter
    model: str = ""
    # reasoning that must go back with the tool calls
    extra: dict[str, Any] = Field(default_factory=dict)


class Sampling(Frozen):
    """None leaves a choice to the endpoint. `extra` goes into the request body as it is."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    extra: dict[str, Any] = Field(default_factory=dict)


DEFAULT_SAMPLING = Sampling()


def with_ids(calls: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
    """The calls, each under an id of its own: results find their call by it. Missing and repeated
    ids are replaced."""
    out: dict[str, ToolCall] = {}
    for call in calls:
        # Nine letters and digits: what the strictest of the known endpoints takes.
        id = call.id if call.id and call.id not in out else secrets.token_hex(5)[:9]
        out[id] = call if id == call.id else call.model_copy(update={"id": id})
    return tuple(out.values())


@runtime_checkable
class LM(Protocol):
    """A chat model. Implementations are safe to call from many tasks of one event loop at once.

    Optional: `warm()`, which begins in the background what the first call would have to wait for,
    and returns at once.
    """

    @property
    def name(self) -> str:
        """As in trajectories and the price table, e.g. "openai:gpt-5-mini"."""
        ...

    @property
    def window(self) -> int | None:
        """Tokens the model can hold, prompt and reply; None: unknown."""
        ...

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        tools: Sequence[ToolSpec] = (),
        # JSON schema the reply's text must satisfy, where the endpoint can
        schema: dict[str, Any] | None = None,
        # called with each piece as it arrives; may never be called
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Raises LMError once retries are used up. Cancelling the task cancels the request."""
        ...

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Prompt tokens, exact or a stated upper estimate; budgets reserve this much before the
        call."""
        ...

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float | None:
        """Dollars for a call of this size; None: unknown (then a dollar budget refuses the model
        before the run)."""
        ...

    async def aclose(self) -> None: ...

    # Optional: `warm()` begins, in the background, what the first call would have to wait for, and
    # returns at once.
