"""Anthropic's Messages API, over the same HTTP core; the anthropic package is not needed.

Prompt caching: the system prompt and the last message are marked with `cache_control`, so that in
an append-only history each call finds the prefix of the call before. A lone message (a sub-call) is
not marked: nobody will ask for its prefix again, and writing the cache costs a quarter more than
reading the prompt.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from rlm_runtime.lms import plain
from rlm_runtime.lms.base import Message, Reply, ToolCall, ToolSpec, Usage, with_ids
from rlm_runtime.lms.chat import Call, ChatLM
from rlm_runtime.lms.http import LARGEST_TEXT, Delivery, Endpoint, EndpointError, Response, Room
from rlm_runtime.lms.openai import as_dict, natural, parsed
from rlm_runtime.replies.reader import read, size_of

log = logging.getLogger("rlm_runtime.lms")

VERSION = "2023-06-01"
MARK = {"type": "ephemeral"}
CACHE_WRITE = 1.25  # price of a prompt token written to the cache, relative to a plain one
MAX_TOKENS = 8192  # the API wants a number
REPLY_TOOL = "reply"  # structured replies are the arguments of a tool the model must call
FINISH = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
# Tokens a model may think for each `reasoning_effort`; the API wants 1024 at least. They come on
# top of `max_tokens`.
THINKING = {
    "minimal": 1024,
    "low": 2048,
    "medium": 8192,
    "high": 16_384,
    "xhigh": 24_576,
    "max": 32_768,
}
_ONE_OF = re.compile(r"\b(temperature|top_p|thinking|stream)\b")


class AnthropicLM(ChatLM):
    """A Claude model.

    Args: those of `ChatLM` (`base_url` is without /v1), and
      cache: mark the stable prefix for prompt caching.
    `Sampling.seed` is ignored: the API has none. A `reasoning_effort` becomes a budget of tokens
    for thinking, with which the API takes neither a temperature nor a tool that must be called: a
    schema is then asked for in words.
    """

    provider = "anthropic"
    official = "https://api.anthropic.com"
    key_variable = "ANTHROPIC_API_KEY"
    url_variable = "ANTHROPIC_BASE_URL"
    path = "/v1/messages"

    def __init__(self, model: str, *, cache: bool = True, **options: Any):
        super().__init__(model, **options)
        self._cache = cache

    def root_of(self, url: str) -> str:
        return url.removesuffix("/v1")

    def auth(self, key: str | None) -> dict[str, str]:
        return {"anthropic-version": VERSION, **({"x-api-key": key} if key else {})}

    def adapt(self, error: EndpointError, body: dict[str, Any], call: Call) -> str | None:
        # Newer models take only one of temperature and top_p, thinking ones neither.
        refused = [f for f in _ONE_OF.findall(str(error)) if f in body]
        if error.kind != "bad_request" or not refused:
            return None
        field = "top_p" if "top_p" in refused else refused[0]
        log.warning(
            "%s does not take %s; it is left out from now on. (%s)", self.name, field, error
        )
        self.adapted.add(field)
        return field

    def body(self, call: Call) -> dict[str, Any]:
        messages, sampling, schema = call.messages, call.sampling, call.schema
        budget = THINKING.get(self._effort or "none") if "thinking" not in self.adapted else None
        by_tool = _by_tool(call) and budget is None
        if schema is not None and not by_tool:
            messages = plain.with_schema(messages, schema)
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": (sampling.max_tokens or MAX_TOKENS) + (budget or 0),
        }
        system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
        if system:
            body["system"] = [
                {"type": "text", "text": system, **({"cache_control": MARK} if self._cache else {})}
            ]
        body["messages"] = turns([m for m in messages if m.role != "system"])
        if self._cache and (system or len(body["messages"]) > 1):
            body["messages"][-1]["content"][-1]["cache_control"] = MARK
        specs: Sequence[ToolSpec] = call.tools
        if by_tool:
            specs = [ToolSpec(name=REPLY_TOOL, description="Give your reply.", parameters=schema)]
            body["tool_choice"] = {"type": "tool", "name": REPLY_TOOL}
        if specs:
            body["tools"] = [
                {"name": t.name, "description": t.description, "input_schema": t.parameters}
                for t in specs
            ]
        chosen: dict[str, Any] = (
            {"temperature": sampling.temperature, "top_p": sampling.top_p} if budget is None else {}
        )
        if budget is not None:
            body["thinking"] = {"type": "enabled", "budget_tokens": budget}
        # the API wants more than spaces
        chosen["stop_sequences"] = [s for s in sampling.stop if s.strip()] or None
        body |= {k: v for k, v in chosen.items() if v is not None and k not in self.adapted}
        if self.streams:
            body["stream"] = True
        return body | self._extra | sampling.extra

    async def read(
        self, response: Response, body: dict[str, Any], call: Call, delivery: Delivery
    ) -> Reply:
        as_reply = "tool_choice" in body and _by_tool(call)
        reading = _Reading(self.endpoint, delivery, as_reply)
        if response.content_type == "text/event-stream":
            async for name, event in response.events():
                reading.event(name, event)
            if not reading.stop and not reading.ended:
                raise self.endpoint.cut()
        else:
            reading.whole(await response.json())
        calls = await read(reading.room.used, reading.tool_calls)
        text = "".join(reading.texts)
        if as_reply and calls:
            arguments = calls[0].arguments
            text = (
                arguments
                if isinstance(arguments, str)
                else json.dumps(arguments, ensure_ascii=False)
            )
            calls = ()
        finish = FINISH.get(reading.stop, "stop")
        if finish == "tool_calls" and not calls:
            finish = "stop"
        return Reply(
            text=text,
            tool_calls=calls,
            usage=self._usage(reading, call.messages),
            model=reading.model or self.model,
            finish_reason=finish,
            extra={"thinking": reading.thinking()} if calls and reading.thinking() else {},
        )

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
            cost += (self.price(written, 0) or 0.0) * (CACHE_WRITE - 1)
        return Usage(
            calls=1,
            input_tokens=spent,
            output_tokens=made,
            cached_tokens=min(cached, spent),
            cost_usd=cost,
            estimated=estimated,
        )


def _by_tool(call: Call) -> bool:
    """Whether a schema can be asked for as the arguments of a tool."""
    return call.schema is not None and not call.tools and call.schema.get("type") == "object"


class _Reading:
    """A reply as it comes in: whole, or event by event. Thinking is no text; it goes back with the
    tool calls."""

    def __init__(self, endpoint: Endpoint, delivery: Delivery, as_reply: bool):
        self.endpoint, self.delivery, self._as_reply = endpoint, delivery, as_reply
        self.stop, self.model, self.ended = "", "", False
        self.usage: dict[str, Any] = {}
        self.room = Room(endpoint)
        self.texts: list[str] = []
        self._blocks: dict[str, dict[str, Any]] = {}  # the block that an index means now
        self._thoughts: list[dict[str, Any]] = []
        self._calls: list[dict[str, Any]] = []

    def whole(self, value: dict[str, Any]) -> None:
        if value.get("type") == "error":
            raise self._failed(value)
        blocks = value.get("content")
        if not isinstance(blocks, list):
            raise self.endpoint.protocol(
                f"sent a reply without content: {self.endpoint.start(self.endpoint.shown(value))}"
            )
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
        return with_ids(
            [ToolCall(id=c["id"], name=c["name"], arguments=_arguments(c)) for c in self._calls]
        )

    def thinking(self) -> list[dict[str, Any]]:
        """Thinking blocks as the API wants them back; those without a signature it refuses."""
        whole = [
            {k: "".join(v) if isinstance(v, list) else v for k, v in b.items()}
            for b in self._thoughts
        ]
        return [b for b in whole if b.get("signature") or b.get("data")]

    def spoken(self) -> str:
        thoughts = (piece for b in self._thoughts for piece in b.get("thinking", ()))
        return "".join(
            [*self.texts, *thoughts, *(piece for c in self._calls for piece in c["json"])]
        )

    def _head(self, message: dict[str, Any]) -> None:
        self.usage |= {k: v for k, v in as_dict(message.get("usage")).items() if v is not None}
        self.stop = str(message.get("stop_reason") or self.stop)
        self.model = str(message.get("model") or self.model)

    def _block(self, index: Any, block: dict[str, Any]) -> None:
        kind = block.get("type")
        self.room.take(size_of(block, LARGEST_TEXT + 1))
        if kind == "tool_use":
            held = {
                "id": str(block.get("id") or ""),
                "name": str(block.get("name") or ""),
                "json": [],
            }
            self._calls.append(held | {"input": as_dict(block.get("input"))})
            self._blocks[str(index)] = self._calls[-1]
        elif kind == "thinking":
            text, signature = (
                block[k] if isinstance(block.get(k), str) else "" for k in ("thinking", "signature")
            )
            self._thoughts.append({"type": kind, "thinking": [text], "signature": [signature]})
            self._blocks[str(index)] = self._thoughts[-1]
        elif kind == "redacted_thinking":
            self._thoughts.append({"type": kind, "data": str(block.get("data") or "")})
        elif kind == "text":
            self._text(block.get("text"))

    def _delta(self, index: Any, delta: dict[str, Any]) -> None:
        kind, held = delta.get("type"), self._blocks.get(str(index), {})
        field = {
            "input_json_delta": "partial_json",
            "thinking_delta": "thinking",
            "signature_delta": "signature",
        }
        piece = delta.get(field.get(str(kind), "text"))
        if not isinstance(piece, str):
            return
        self.room.take(len(piece))
        if kind == "text_delta":
            self._text(piece)
        elif kind == "input_json_delta" and "json" in held:
            held["json"].append(piece)
            if self._as_reply:
                self.delivery(piece)
        elif kind in ("thinking_delta", "signature_delta") and "thinking" in held:
            held[field[kind]].append(piece)

    def _text(self, text: Any) -> None:
        if isinstance(text, str) and text:
            self.texts.append(text)
            if not self._as_reply:
                self.delivery(text)

    def _failed(self, value: dict[str, Any]) -> EndpointError:
        statuses = {
            "overloaded_error": 529,
            "rate_limit_error": 429,
            "invalid_request_error": 400,
            "authentication_error": 401,
            "permission_error": 403,
            "not_found_error": 404,
        }
        status = statuses.get(str(as_dict(value.get("error")).get("type")), 500)
        return self.endpoint.refusal(status, self.endpoint.shown(value))


def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the API wants them: user and assistant in turn, the user first, no empty
    texts."""
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
    # a beginning of the reply: no spaces at its end
    if out[-1]["role"] == "assistant" and last["type"] == "text":
        last["text"] = last["text"].rstrip() or "(empty)"
    return out


def _arguments(call: dict[str, Any]) -> dict[str, Any] | str:
    return parsed("".join(call["json"])) if any(call["json"]) else call["input"]


def _blocks(message: Message) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [
            {
                "type": "tool_result",
                "tool_use_id": message.tool_call_id or "",
                "content": message.content,
            }
        ]
    thinking = message.extra.get("thinking") if message.tool_calls else None
    blocks: list[dict[str, Any]] = [dict(b) for b in thinking] if isinstance(thinking, list) else []
    if message.content.strip() or not message.tool_calls:
        blocks.append(
            {"type": "text", "text": message.content if message.content.strip() else "(empty)"}
        )
    for call in message.tool_calls:
        given = call.arguments if isinstance(call.arguments, dict) else {"text": call.arguments}
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks
