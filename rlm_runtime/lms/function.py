"""A function as a language model: the shortest way to any client library."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms import prices, tokens
from rlm_runtime.lms.base import DEFAULT_SAMPLING, Message, Reply, Sampling, ToolSpec, Usage
from rlm_runtime.lms.http import Delivery, Endpoint
from rlm_runtime.lms.openai import Reading, as_openai, openai_tool, strict, usage_of
from rlm_runtime.lms.stops import StopCutter


class FunctionLM:
    """A model that is a function of the messages, `async` or not.

    Args:
      function: called with the messages as `[{"role": ..., "content": ...}, ...]` and, where a call
        has them, the keyword arguments of the OpenAI API: `temperature`, `top_p`, `max_tokens`,
        `seed`, `stop`, `tools`, `response_format`. It returns the reply's text, a `Reply`, or a
        chat completion of the OpenAI API: a mapping, or an object with `model_dump()`. One that is
        not async runs in a thread.
      name: for trajectories and prices, "provider:model".
      window: tokens the model holds; price, tokenizer: as of `lms.chat.ChatLM`.
      options: further keyword arguments for every call.
    What the function raises ends the call as an LMError without a retry: client libraries have
    their own.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        window: int | None = None,
        price: Any = None,
        tokenizer: Callable[[str], int] | None = None,
        **options: Any,
    ):
        if not callable(function):
            raise UsageError(
                f"FunctionLM: expected a function of messages, got {type(function).__name__}."
            )
        self.name = name or f"function:{getattr(function, '__name__', type(function).__name__)}"
        self._function, self._options = function, options
        self._table = prices.Table(self.name, given=price, window=window)
        self._tokenizer = tokenizer or tokens.estimate
        self._errors = Endpoint(self.name, "http://function", {})  # words for what is no completion
        self._errors.base_url = "the function"

    def __repr__(self) -> str:
        return f"FunctionLM({self.name!r})"

    @property
    def window(self) -> int | None:
        return self._table.window

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """What the function returns, as a reply.

        Raises:
          LMError: it returned what is none of the forms. What the function itself raises is raised
            as it is.
        """
        given = sampling.model_dump(
            include={"temperature", "top_p", "max_tokens", "seed"}, exclude_none=True
        )
        if sampling.stop:
            given["stop"] = list(sampling.stop)
        if tools:
            given["tools"] = [openai_tool(t) for t in tools]
        if schema is not None:
            wanted = {"name": "reply", "schema": schema, "strict": strict(schema)}
            given["response_format"] = {"type": "json_schema", "json_schema": wanted}
        sent = [as_openai(m) for m in messages]
        options = {**self._options, **given, **sampling.extra}
        if inspect.iscoroutinefunction(self._function):
            made = await self._function(sent, **options)
        else:
            made = await asyncio.to_thread(self._function, sent, **options)
            if inspect.isawaitable(made):
                made = await made
        reply = self._reply(made, messages)
        if on_text and reply.text:
            on_text(reply.text)
        return reply

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return tokens.count(messages, self._tokenizer)

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float | None:
        price = self._table.price
        return price.dollars(input_tokens, output_tokens, cached_tokens) if price else None

    async def aclose(self) -> None:
        """Nothing is open."""

    def _reply(self, made: Any, messages: Sequence[Message]) -> Reply:
        if isinstance(made, Reply):
            return (
                made
                if made.usage.calls
                else made.model_copy(update={"usage": self._usage({}, made, messages)})
            )
        if isinstance(made, str):
            reply = Reply(text=made, model=self.name)
            return reply.model_copy(update={"usage": self._usage({}, reply, messages)})
        value = made.model_dump() if hasattr(made, "model_dump") else made
        if not isinstance(value, Mapping):
            raise LMError(
                f"{self.name}: the function returned {type(made).__name__}; expected a text, a Reply, or a chat completion.",
                kind="protocol",
                model=self.name,
            )
        reading = Reading(self._errors, StopCutter(()), Delivery(None))
        reading.whole(dict(value))
        reply = reading.reply()
        usage = self._usage(reading.usage, reply, messages, reading.spoken())
        return reply.model_copy(update={"usage": usage, "model": reading.model or self.name})

    def _usage(
        self,
        raw: dict[str, Any],
        reply: Reply,
        messages: Sequence[Message],
        spoken: str | None = None,
    ) -> Usage:
        return usage_of(
            self, raw, messages, reply.text if spoken is None else spoken, self._tokenizer
        )
