"""Any OpenAI-compatible endpoint: /chat/completions of OpenAI, vLLM, SGLang, llama.cpp, Ollama, OpenRouter, ...

Endpoints differ in what they accept. A body that is refused for an optional field is sent again without it, or with
the field's other spelling, and the instance remembers (`adapted` says what). What is left out is made up for where it
can be: a schema is asked for in words, tools too, stop strings are applied here.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from rlm_runtime.errors import UsageError
from rlm_runtime.lms import plain, prices, tokens
from rlm_runtime.lms.base import DEFAULT_SAMPLING, Message, Reply, Sampling, ToolCall, ToolSpec, Usage
from rlm_runtime.lms.http import Delivery, Endpoint, EndpointError, Response, check_key, check_url, show, warm
from rlm_runtime.lms.stops import StopCutter
from rlm_runtime.replies import model_json

log = logging.getLogger("rlm_runtime.lms")

OFFICIAL = "https://api.openai.com/v1"
DROPPABLE = ("temperature", "top_p", "seed", "stop", "stream_options")  # refused by some models or servers
FINISH = {"function_call": "tool_calls", "max_tokens": "length", "eos": "stop", "end_turn": "stop"}


class OpenAILM:
    """A chat model behind an OpenAI-compatible endpoint.

    Args:
      model: as the endpoint calls it.
      base_url: up to and including /v1; default: OPENAI_BASE_URL, else OpenAI's own.
      api_key: default: OPENAI_API_KEY. Local servers mostly need none.
      window: tokens the model holds; default: of the table in `prices`, else unknown.
      price: see `prices.price_of`.
      extra_body: fields for every request ({"reasoning_effort": "low"}); `Sampling.extra` goes on top.
      headers: more HTTP headers.
      tokenizer: exact number of tokens of a text; default: the estimate of `tokens`.
      provider: the part of `name` before the colon.
      **http: timeout, connect_timeout, read_timeout, max_retries, backoff, backoff_cap, concurrency,
        requests_per_minute, tokens_per_minute: see `http.Endpoint`.
    Raises:
      UsageError: no key for OpenAI's own endpoint, a URL that is none, an option out of range.
    """

    def __init__(
        self, model: str, *, base_url: str | None = None, api_key: str | None = None, window: int | None = None,
        price: Any = None, extra_body: dict[str, Any] | None = None, headers: dict[str, str] | None = None,
        tokenizer: Callable[[str], int] | None = None, provider: str = "openai", **http: Any,
    ):  # fmt: skip
        self.model, self.name = model, f"{provider}:{model}"
        base_url = check_url(self.name, base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL)
        key = check_key(self.name, api_key if api_key is not None else os.environ.get("OPENAI_API_KEY"))
        official = urlsplit(base_url).hostname == "api.openai.com"
        if official and not key:
            raise UsageError(
                f"{self.name}: no API key. Set OPENAI_API_KEY or pass api_key=; for a server of your own pass base_url= "
                "or set OPENAI_BASE_URL."
            )
        self.endpoint = Endpoint(
            self.name, base_url, {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})},
            secrets=(key or "", *(headers or {}).values()), hint="Is the server running, and base_url right?", **http,
        )  # fmt: skip
        known = prices.known(self.name)
        self.window = window if window is not None else (known.window if known else None)
        self._price = prices.price_of(self.name, price)
        self._extra, self._tokenizer = dict(extra_body or {}), tokenizer or tokens.estimate
        self._limit_field = "max_completion_tokens" if official else "max_tokens"
        self.adapted: set[str] = set()  # fields this endpoint turned out not to take
        self._plain_schemas: set[str] = set()  # schemas it refused

    def __repr__(self) -> str:
        return f"OpenAILM({self.model!r}, base_url={show(self.endpoint.base_url)!r})"

    async def complete(
        self, messages: Sequence[Message], *, sampling: Sampling = DEFAULT_SAMPLING, tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None, on_text: Callable[[str], None] | None = None,
    ) -> Reply:  # fmt: skip
        """One reply; streamed when `on_text` is given.

        Raises:
          LMError: see `LMError.kind`.
        """
        delivery = Delivery(on_text)
        expected = self.count_tokens(messages) + (sampling.max_tokens or 0)
        suspected = False  # that a refusal which names nothing means response_format
        while True:
            body = self._body(messages, sampling, tools, schema, on_text is not None, suspected)
            read = lambda response, body=body: self._read(response, body, messages, sampling, tools, delivery)
            try:
                reply = await self.endpoint.post("/chat/completions", body, read, delivery=delivery, tokens=expected)
            except EndpointError as e:
                if delivery.chars or e.status not in (400, 422, 501) or e.kind == "context_overflow":
                    raise
                if field := _culprit(e, body):
                    self._adapt(field, e, schema)
                elif "response_format" in body:
                    suspected = True
                else:
                    raise
                continue
            if suspected:
                self.adapted.add("response_format")
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
        schema: dict[str, Any] | None, stream: bool, no_format: bool,
    ) -> dict[str, Any]:  # fmt: skip
        body: dict[str, Any] = {"model": self.model}
        if tools and "tools" in self.adapted:
            messages, tools = plain.with_tools(messages, tools), ()
        if schema is not None:
            if no_format or "response_format" in self.adapted or _key(schema) in self._plain_schemas:
                messages = plain.with_schema(messages, schema)
            else:
                wanted = {"name": "reply", "schema": schema, "strict": strict(schema)}
                body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        body["messages"] = [_message(m) for m in messages]
        if tools:
            body["tools"] = [
                {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
                for t in tools
            ]  # fmt: skip
        if sampling.max_tokens is not None:
            body[self._limit_field] = sampling.max_tokens
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        chosen["stop"] = list(sampling.stop) or None
        if stream:
            body["stream"] = True
            chosen["stream_options"] = {"include_usage": True}
        body |= {k: v for k, v in chosen.items() if v is not None and k not in self.adapted}
        return body | self._extra | sampling.extra

    def _adapt(self, field: str, error: EndpointError, schema: dict[str, Any] | None) -> None:
        """Remember that the endpoint does not take `field`."""
        if field == "response_format" and _about_the_schema(error):
            self._plain_schemas.add(_key(schema))
            return
        if field in ("max_tokens", "max_completion_tokens"):
            self._limit_field = "max_completion_tokens" if field == "max_tokens" else "max_tokens"
        elif field in ("temperature", "top_p", "seed"):
            log.warning("%s does not take %s; it is left out from now on. (%s)", self.name, field, error)
        self.adapted.add(field)

    async def _read(
        self, response: Response, body: dict[str, Any], messages: Sequence[Message], sampling: Sampling,
        tools: Sequence[ToolSpec], delivery: Delivery,
    ) -> Reply:  # fmt: skip
        here = sampling.stop if "stop" in self.adapted else ()
        reading = _Reading(self.endpoint, StopCutter(here), delivery)
        asked = body.get("stream") and response.content_type != "application/json"
        if asked or response.content_type == "text/event-stream":
            async for _, chunk in response.events():
                reading.chunk(chunk)
            if reading.finish is None and not response.done:
                raise self.endpoint.cut()
        else:
            reading.whole(await response.json())
        reading.deliver(reading.stops.flush())
        text, calls = reading.stops.text, reading.tool_calls()
        if tools and "tools" not in body and (plain_calls := plain.read_tool_calls(text, tools)):
            text, calls = "", plain_calls
        finish = FINISH.get(reading.finish or "stop", reading.finish or "stop")
        if calls and finish == "stop":
            finish = "tool_calls"
        return Reply(
            text=text, tool_calls=calls, usage=self._usage(reading, messages), model=reading.model or self.model,
            finish_reason=finish if finish in ("stop", "length", "tool_calls", "content_filter") else "stop",
        )  # fmt: skip

    def _usage(self, reading: _Reading, messages: Sequence[Message]) -> Usage:
        raw = reading.usage
        spent, made = natural(raw.get("prompt_tokens")), natural(raw.get("completion_tokens"))
        estimated = spent is None or made is None
        if spent is None:
            spent = self.count_tokens(messages)
        if made is None:
            made = self._tokenizer(reading.spoken())
        cached = natural(as_dict(raw.get("prompt_tokens_details")).get("cached_tokens")) or 0
        cached = min(cached, spent)
        cost, told = self.price(spent, made, cached), raw.get("cost")
        if cost is None and isinstance(told, int | float) and not isinstance(told, bool) and 0 <= told < float("inf"):
            cost = float(told)  # some routers say what they charge
        return Usage(
            calls=1, input_tokens=spent, output_tokens=made, cached_tokens=cached, cost_usd=cost, estimated=estimated
        )


class _Reading:
    """A reply as it comes in, whole or in chunks. Nothing about the shapes is taken on trust."""

    def __init__(self, endpoint: Endpoint, stops: StopCutter, delivery: Delivery):
        self.endpoint, self.stops, self.delivery = endpoint, stops, delivery
        self.finish: str | None = None
        self.model, self.usage = "", {}
        self._calls: dict[Any, dict[str, str]] = {}
        self._thoughts: list[str] = []

    def whole(self, value: dict[str, Any]) -> None:
        self._head(value)
        choice = self._choice(value)
        if choice is None:
            raise self.endpoint.protocol(f"sent a reply without choices: {json.dumps(value)[:200]}")
        self.finish = _string(choice.get("finish_reason")) or "stop"
        self._part(as_dict(choice.get("message")))

    def chunk(self, value: dict[str, Any]) -> None:
        self._head(value)
        choice = self._choice(value)
        if choice is not None:
            self._part(as_dict(choice.get("delta") or choice.get("message")))
            self.finish = _string(choice.get("finish_reason")) or self.finish

    def deliver(self, text: str) -> None:
        self.delivery(text)

    def spoken(self) -> str:
        """All text the model produced, for an estimate of its tokens."""
        calls = (c["name"] + c["arguments"] for c in self._calls.values())
        return "".join([self.stops.text, *self._thoughts, *calls])

    def tool_calls(self) -> tuple[ToolCall, ...]:
        return tuple(
            ToolCall(id=c["id"] or f"call_{i}", name=c["name"], arguments=parsed(c["arguments"]))
            for i, c in enumerate(self._calls.values())
        )

    def _head(self, value: dict[str, Any]) -> None:
        error = value.get("error")
        if error:  # with status 200: routers, and servers that fail in the middle of a stream
            code = as_dict(error).get("code")
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            raise self.endpoint.refusal(status, json.dumps({"error": error}).encode())
        self.usage = as_dict(value.get("usage")) or self.usage
        self.model = _string(value.get("model")) or self.model

    @staticmethod
    def _choice(value: dict[str, Any]) -> dict[str, Any] | None:
        choices = value.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        return first if isinstance(first, dict) else None

    def _part(self, part: dict[str, Any]) -> None:
        text = content_text(part.get("content"))
        if not text and isinstance(part.get("refusal"), str):
            text, self.finish = part["refusal"], "content_filter"
        self.deliver(self.stops.push(text))
        self._thoughts += [v for v in (part.get("reasoning_content"), part.get("reasoning")) if isinstance(v, str)][:1]
        calls = part.get("tool_calls")
        for position, call in enumerate(calls if isinstance(calls, list) else ()):
            self._call(as_dict(call), position)

    def _call(self, call: dict[str, Any], position: int) -> None:
        function = as_dict(call.get("function"))
        index = call.get("index")
        if not isinstance(index, int):  # servers that leave it out send a call whole, or name it by id
            index = call.get("id") if isinstance(call.get("id"), str) else position
        held = self._calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
        held["id"] = held["id"] or _string(call.get("id")) or ""
        held["name"] = held["name"] or _string(function.get("name")) or ""
        arguments = function.get("arguments")
        held["arguments"] += arguments if isinstance(arguments, str) else json.dumps(arguments) if arguments else ""


_UNSUPPORTED = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|extra (inputs|fields)|"
    r"not implemented|not available|not enabled|requires --|deprecated|use '?max_",
    re.IGNORECASE,
)
_FORMAT = re.compile(r"response_format|json_schema|json schema|structured output|guided|grammar", re.IGNORECASE)
_TOOLS = re.compile(r"\btools?\b|function call|tool[_-]choice", re.IGNORECASE)


def _culprit(error: EndpointError, body: dict[str, Any]) -> str | None:
    """The optional field of `body` that a refusal is about; None: no field we could do without."""
    message, named = str(error), (error.param or "").partition(".")[0]
    if "response_format" in body and (named == "response_format" or _FORMAT.search(message)):
        return "response_format"
    if not _UNSUPPORTED.search(message) and error.code not in ("unsupported_parameter", "unsupported_value"):
        return None
    optional = [f for f in (*DROPPABLE, "max_tokens", "max_completion_tokens") if f in body]
    if named in optional:
        return named
    for field in optional:
        if re.search(rf"\b{field}\b", message):
            return field
    return "tools" if "tools" in body and (named in ("tools", "tool_choice") or _TOOLS.search(message)) else None


def _about_the_schema(error: EndpointError) -> bool:
    """The endpoint has structured replies, but not for this schema."""
    return error.code == "invalid_json_schema" or "invalid schema" in str(error).lower()


def strict(schema: Any) -> bool:
    """Whether a schema is of the subset that strict structured replies ask for: closed objects, all fields required."""
    if isinstance(schema, list):
        return all(strict(s) for s in schema)
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" or "properties" in schema:
        fields = schema.get("properties")
        if schema.get("additionalProperties") is not False or not isinstance(fields, dict):
            return False
        if set(schema.get("required", ())) != set(fields):
            return False
    return all(strict(v) for v in schema.values())


def _message(message: Message) -> dict[str, Any]:
    if message.role == "tool":
        return {"role": "tool", "tool_call_id": message.tool_call_id or "", "content": message.content}
    if not message.tool_calls:
        return {"role": message.role, "content": message.content}
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": as_json(c.arguments)}}
        for c in message.tool_calls
    ]
    return {"role": message.role, "content": message.content or None, "tool_calls": calls}


def content_text(content: Any) -> str:
    """Text of a content field: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str))


def parsed(arguments: str) -> dict[str, Any] | str:
    """A tool call's arguments: the object, or the text where it is none."""
    found = model_json.loads(arguments or "{}")
    return found[0] if found is not None and isinstance(found[0], dict) else arguments


def as_json(arguments: dict[str, Any] | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def natural(value: Any) -> int | None:
    """A count out of a usage object; None: it is none."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15
    return int(value) if good else None


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _key(schema: Any) -> str:
    return json.dumps(schema, sort_keys=True)
