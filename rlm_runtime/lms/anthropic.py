"""Anthropic's Messages API, over the same HTTP core; the anthropic package is not needed.

Prompt caching: the system prompt and the last message are marked with `cache_control`, so that in an append-only
history each call finds the prefix of the call before. A lone message (a sub-call) is not marked: nobody will ask for
its prefix again, and writing the cache costs a quarter more than reading the prompt.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.lms import plain, prices, tokens
from rlm_runtime.lms.base import DEFAULT_SAMPLING, Message, Reply, Sampling, ToolCall, ToolSpec, Usage
from rlm_runtime.lms.http import Delivery, Endpoint, EndpointError, Response, check_key, check_url, show, warm
from rlm_runtime.lms.openai import as_dict, natural, parsed

log = logging.getLogger("rlm_runtime.lms")

OFFICIAL = "https://api.anthropic.com"
VERSION = "2023-06-01"
MARK = {"type": "ephemeral"}
CACHE_WRITE = 1.25  # price of a prompt token written to the cache, relative to a plain one
REPLY_TOOL = "reply"  # structured replies are the arguments of a tool the model must call
FINISH = {"max_tokens": "length", "model_context_window_exceeded": "length", "tool_use": "tool_calls",
          "refusal": "content_filter"}  # fmt: skip
_ONE_OF = re.compile(r"\b(temperature|top_p)\b")


class AnthropicLM:
    """A Claude model.

    Args:
      model: "claude-sonnet-4-5", ...
      api_key: default: ANTHROPIC_API_KEY.
      base_url: without /v1; default: ANTHROPIC_BASE_URL, else Anthropic's own.
      max_tokens: of a reply, where the sampling does not say; the API wants a number.
      cache: mark the stable prefix for prompt caching.
      window, price, extra_body, headers, tokenizer, **http: as of `OpenAILM`.
    `Sampling.seed` is ignored: the API has none.
    Raises:
      UsageError: no key, a URL that is none, an option out of range.
    """

    def __init__(
        self, model: str, *, api_key: str | None = None, base_url: str | None = None, max_tokens: int = 8192,
        cache: bool = True, window: int | None = None, price: Any = None, extra_body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None, tokenizer: Callable[[str], int] | None = None, **http: Any,
    ):  # fmt: skip
        self.model, self.name = model, f"anthropic:{model}"
        url = check_url(self.name, base_url or os.environ.get("ANTHROPIC_BASE_URL") or OFFICIAL)
        key = check_key(self.name, api_key if api_key is not None else os.environ.get("ANTHROPIC_API_KEY"))
        if url == OFFICIAL and not key:
            raise UsageError(f"{self.name}: no API key. Set ANTHROPIC_API_KEY or pass api_key=.")
        if max_tokens < 1:
            raise UsageError(f"{self.name}: max_tokens must be at least 1, got {max_tokens}.")
        self.endpoint = Endpoint(
            self.name, url.removesuffix("/v1"),
            {"anthropic-version": VERSION, **({"x-api-key": key} if key else {}), **(headers or {})},
            secrets=(key or "", *(headers or {}).values()), hint="Is base_url right?", **http,
        )  # fmt: skip
        known = prices.known(self.name)
        self.window = window if window is not None else (known.window if known else None)
        self._price = prices.price_of(self.name, price)
        self._max_tokens, self._cache = max_tokens, cache
        self._extra, self._tokenizer = dict(extra_body or {}), tokenizer or tokens.estimate
        self.adapted: set[str] = set()  # sampling fields this model turned out not to take

    def __repr__(self) -> str:
        return f"AnthropicLM({self.model!r}, base_url={show(self.endpoint.base_url)!r})"

    async def complete(
        self, messages: Sequence[Message], *, sampling: Sampling = DEFAULT_SAMPLING, tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None, on_text: Callable[[str], None] | None = None,
    ) -> Reply:  # fmt: skip
        """One reply; streamed when `on_text` is given.

        Raises:
          LMError: see `LMError.kind`.
        """
        delivery = Delivery(on_text)
        expected = self.count_tokens(messages) + (sampling.max_tokens or self._max_tokens)
        while True:
            body, as_reply = self._body(messages, sampling, tools, schema, on_text is not None)
            read = lambda response, body=body, as_reply=as_reply: self._read(response, messages, delivery, as_reply)
            try:
                reply = await self.endpoint.post("/v1/messages", body, read, delivery=delivery, tokens=expected)
            except EndpointError as e:
                # Newer models take only one of temperature and top_p, thinking ones neither.
                refused = [f for f in _ONE_OF.findall(str(e)) if f in body]
                if delivery.chars or e.kind != "bad_request" or not refused:
                    raise
                field = "top_p" if "top_p" in refused else refused[0]
                log.warning("%s does not take %s; it is left out from now on. (%s)", self.name, field, e)
                self.adapted.add(field)
                continue
            self.endpoint.tokens.give_back(expected - reply.usage.input_tokens - reply.usage.output_tokens)
            return reply

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """With a tokenizer its count and a frame for each message, else the upper estimate of `tokens`."""
        return tokens.count(messages, self._tokenizer)

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float | None:
        return self._price.dollars(input_tokens, output_tokens, cached_tokens) if self._price else None

    def warm(self) -> None:
        """Optional: begin, in the background, what the first call would have to wait for."""
        warm()

    async def aclose(self) -> None:
        """Close the connections of the running event loop; the model stays usable."""
        await self.endpoint.aclose()

    def _body(
        self, messages: Sequence[Message], sampling: Sampling, tools: Sequence[ToolSpec],
        schema: dict[str, Any] | None, stream: bool,
    ) -> tuple[dict[str, Any], bool]:  # fmt: skip
        """The request, and whether the reply comes as arguments of the reply tool."""
        by_tool = schema is not None and not tools and schema.get("type") == "object"
        if schema is not None and not by_tool:
            messages = plain.with_schema(messages, schema)
        body: dict[str, Any] = {"model": self.model, "max_tokens": sampling.max_tokens or self._max_tokens}
        system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
        if system:
            body["system"] = [{"type": "text", "text": system, **({"cache_control": MARK} if self._cache else {})}]
        body["messages"] = turns([m for m in messages if m.role != "system"])
        if self._cache and (system or len(body["messages"]) > 1):
            body["messages"][-1]["content"][-1]["cache_control"] = MARK
        specs = [ToolSpec(name=REPLY_TOOL, description="Give your reply.", parameters=schema)] if by_tool else tools
        if specs:
            body["tools"] = [
                {"name": t.name, "description": t.description, "input_schema": t.parameters} for t in specs
            ]
        if by_tool:
            body["tool_choice"] = {"type": "tool", "name": REPLY_TOOL}
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        chosen["stop_sequences"] = [s for s in sampling.stop if s.strip()] or None  # the API wants more than spaces
        body |= {k: v for k, v in chosen.items() if v is not None and k not in self.adapted}
        if stream:
            body["stream"] = True
        return body | self._extra | sampling.extra, by_tool

    async def _read(
        self, response: Response, messages: Sequence[Message], delivery: Delivery, as_reply: bool
    ) -> Reply:  # fmt: skip
        reading = _Reading(self.endpoint, delivery, as_reply)
        if response.content_type == "text/event-stream":
            async for name, event in response.events():
                reading.event(name, event)
            if not reading.stop and not reading.ended:
                raise self.endpoint.cut()
        else:
            reading.whole(await response.json())
        calls, text = reading.tool_calls(), "".join(reading.texts)
        if as_reply and calls:
            arguments = calls[0].arguments
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls = ()
        finish = FINISH.get(reading.stop, "stop")
        if finish == "tool_calls" and not calls:
            finish = "stop"
        return Reply(
            text=text, tool_calls=calls, usage=self._usage(reading, messages), model=reading.model or self.model,
            finish_reason=finish,
        )  # fmt: skip

    def _usage(self, reading: _Reading, messages: Sequence[Message]) -> Usage:
        raw = reading.usage
        fresh, made = natural(raw.get("input_tokens")), natural(raw.get("output_tokens"))
        cached = natural(raw.get("cache_read_input_tokens")) or 0
        written = natural(raw.get("cache_creation_input_tokens")) or 0
        estimated = fresh is None or made is None
        spent = self.count_tokens(messages) if fresh is None else fresh + cached + written
        if made is None:
            made = self._tokenizer(reading.spoken())
        cost = self.price(spent, made, min(cached, spent))
        if cost is not None and written and fresh is not None:
            cost += self._price.dollars(written, 0) * (CACHE_WRITE - 1)
        return Usage(
            calls=1, input_tokens=spent, output_tokens=made, cached_tokens=min(cached, spent), cost_usd=cost,
            estimated=estimated,
        )  # fmt: skip


class _Reading:
    """A reply as it comes in: whole, or event by event. Thinking blocks are passed over."""

    def __init__(self, endpoint: Endpoint, delivery: Delivery, as_reply: bool):
        self.endpoint, self.delivery, self._as_reply = endpoint, delivery, as_reply
        self.stop, self.model, self.ended = "", "", False
        self.usage: dict[str, Any] = {}
        self.texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: dict[Any, dict[str, Any]] = {}

    def whole(self, value: dict[str, Any]) -> None:
        if value.get("type") == "error":
            raise self._failed(value)
        blocks = value.get("content")
        if not isinstance(blocks, list):
            raise self.endpoint.protocol(f"sent a reply without content: {json.dumps(value)[:200]}")
        self._head(value)
        for index, block in enumerate(blocks):
            self._block(index, as_dict(block))

    def event(self, name: str, event: dict[str, Any]) -> None:
        kind = event.get("type") or name
        if kind == "error":
            raise self._failed(event)
        if kind == "message_start":
            self._head(as_dict(event.get("message")))
        elif kind == "content_block_start":
            self._block(event.get("index"), as_dict(event.get("content_block")))
        elif kind == "content_block_delta":
            self._delta(event.get("index"), as_dict(event.get("delta")))
        elif kind == "message_delta":
            self._head({**as_dict(event.get("delta")), "usage": event.get("usage")})
        elif kind == "message_stop":
            self.ended = True

    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(
            ToolCall(id=c["id"], name=c["name"], arguments=parsed(c["json"]) if c["json"] else c["input"])
            for c in self._calls.values()
        )

    def spoken(self) -> str:
        return "".join([*self.texts, *self._thoughts, *(c["json"] for c in self._calls.values())])

    def _head(self, message: dict[str, Any]) -> None:
        self.usage |= {k: v for k, v in as_dict(message.get("usage")).items() if v is not None}
        self.stop = str(message.get("stop_reason") or self.stop)
        self.model = str(message.get("model") or self.model)

    def _block(self, index: Any, block: dict[str, Any]) -> None:
        if block.get("type") == "tool_use":
            name, given = str(block.get("name") or ""), as_dict(block.get("input"))
            self._calls[str(index)] = {"id": str(block.get("id") or ""), "name": name, "input": given, "json": ""}
        elif block.get("type") == "text":
            self._text(block.get("text"))

    def _delta(self, index: Any, delta: dict[str, Any]) -> None:
        if delta.get("type") == "text_delta":
            self._text(delta.get("text"))
        elif delta.get("type") == "input_json_delta" and str(index) in self._calls:
            piece = delta.get("partial_json")
            self._calls[str(index)]["json"] += piece if isinstance(piece, str) else ""
            if self._as_reply and isinstance(piece, str):
                self.delivery(piece)
        elif delta.get("type") == "thinking_delta" and isinstance(delta.get("thinking"), str):
            self._thoughts.append(delta["thinking"])

    def _text(self, text: Any) -> None:
        if isinstance(text, str) and text:
            self.texts.append(text)
            if not self._as_reply:
                self.delivery(text)

    def _failed(self, value: dict[str, Any]) -> EndpointError:
        statuses = {"overloaded_error": 529, "rate_limit_error": 429, "invalid_request_error": 400,
                    "authentication_error": 401, "permission_error": 403, "not_found_error": 404}  # fmt: skip
        status = statuses.get(as_dict(value.get("error")).get("type"), 500)
        return self.endpoint.refusal(status, json.dumps(value).encode())


def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the API wants them: user and assistant in turn, the user first, no empty texts."""
    out: list[dict[str, Any]] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        if not out and role == "assistant":
            out.append({"role": "user", "content": [{"type": "text", "text": "(begin)"}]})
        blocks = _blocks(message)
        if out and out[-1]["role"] == role:
            out[-1]["content"] += blocks
        elif blocks:
            out.append({"role": role, "content": blocks})
    if not out:
        out.append({"role": "user", "content": [{"type": "text", "text": "(empty)"}]})
    last = out[-1]["content"][-1]
    if out[-1]["role"] == "assistant" and last["type"] == "text":  # a beginning of the reply: no spaces at its end
        last["text"] = last["text"].rstrip() or "(empty)"
    return out


def _blocks(message: Message) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id or "", "content": message.content}]
    blocks: list[dict[str, Any]] = []
    if message.content.strip() or not message.tool_calls:
        blocks.append({"type": "text", "text": message.content if message.content.strip() else "(empty)"})
    for call in message.tool_calls:
        given = call.arguments if isinstance(call.arguments, dict) else {"text": call.arguments}
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks
