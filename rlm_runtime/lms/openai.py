"""Any OpenAI-compatible endpoint: /chat/completions of OpenAI, vLLM, SGLang, llama.cpp, Ollama,
OpenRouter, ...

Endpoints differ in what they accept. A body that is refused for an optional field is sent again
without it, or with the field's other spelling, and the instance remembers (`adapted` says what).
What is left out is made up for where it can be: a schema is asked for in words, tools too, stop
strings are applied here.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from rlm_runtime.lms import plain
from rlm_runtime.lms.base import LM, Message, Reply, ToolCall, ToolSpec, Usage, with_ids
from rlm_runtime.lms.chat import Call, ChatLM
from rlm_runtime.lms.http import LARGEST_TEXT, Delivery, Endpoint, EndpointError, Response, Room
from rlm_runtime.lms.stops import StopCutter
from rlm_runtime.replies import model_json
from rlm_runtime.replies.reader import read, size_of

log = logging.getLogger("rlm_runtime.lms")

# Fields that some models or servers refuse; `stream` last, since `stream_options` go with it.
DROPPABLE = ("temperature", "top_p", "seed", "stop", "reasoning_effort", "stream_options", "stream")
FINISH = {
    "function_call": "tool_calls",
    "max_tokens": "length",
    "model_length": "length",
    "eos": "stop",
    "end_turn": "stop",
    "safety": "content_filter",
    "recitation": "content_filter",
    "blocklist": "content_filter",
    "prohibited_content": "content_filter",
    "spii": "content_filter",
    "refusal": "content_filter",
}
# go back with the tool calls they led to
REASONING = ("reasoning_content", "reasoning", "reasoning_details")
NO_SYSTEM_ROLE = re.compile(
    r"system[ _-]?(role|messages?|prompts?|instructions?)\b.{0,40}\b(not|un)\W?\s?(support|allow|enabl|permit|accept)"
    r"|\b(not|un)\W?\s?(support\w*|allow\w*|accept\w*)\b.{0,40}\bsystem\b.{0,3}\s?(role|message|prompt|instruction)"
    r"|role.{0,40}does not support.{0,4}system|developer instruction is not enabled|roles must alternate"
    r"|only user.{0,40}roles? (are|is) (supported|allowed)|(invalid|unknown|unsupported) role:? .?system",
    re.IGNORECASE,
)


class OpenAILM(ChatLM):
    """A chat model behind an OpenAI-compatible endpoint.

    Args: those of `ChatLM`; `provider` is the part of `name` before the colon.
    """

    provider = "openai"
    official = "https://api.openai.com/v1"
    key_variable = "OPENAI_API_KEY"
    url_variable = "OPENAI_BASE_URL"
    path = "/chat/completions"
    refused = NO_SYSTEM_ROLE  # llama.cpp answers 500

    def __init__(self, model: str, *, provider: str | None = None, **options: Any):
        self.provider = provider or type(self).provider
        super().__init__(model, **options)
        self._limit_field = (
            "max_completion_tokens" if self.is_official(self.endpoint.base_url) else "max_tokens"
        )
        self._plain_schemas: set[str] = set()  # schemas the endpoint refused

    def body(self, call: Call) -> dict[str, Any]:
        messages, sampling, tools, schema = call.messages, call.sampling, call.tools, call.schema
        body: dict[str, Any] = {"model": self.model}
        if tools and "tools" in self.adapted:
            messages, tools = plain.with_tools(messages, tools), ()
        if schema is not None:
            if (
                call.no_format
                or "response_format" in self.adapted
                or _key(schema) in self._plain_schemas
            ):
                messages = plain.with_schema(messages, schema)
            else:
                wanted = {"name": "reply", "schema": schema, "strict": strict(schema)}
                body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        if "system" in self.adapted:
            messages = plain.without_system(messages)
        body["messages"] = [
            as_openai(m, reasoning="reasoning" not in self.adapted) for m in messages
        ]
        if tools:
            body["tools"] = [openai_tool(t) for t in tools]
        if sampling.max_tokens is not None:
            body[self._limit_field] = sampling.max_tokens
        chosen: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        chosen["stop"] = list(sampling.stop) or None
        chosen["reasoning_effort"] = self._effort
        if self.streams:
            body["stream"] = True
            chosen["stream_options"] = {"include_usage": True}
        body |= {k: v for k, v in chosen.items() if v is not None and k not in self.adapted}
        return body | self._extra | sampling.extra

    def adapt(self, error: EndpointError, body: dict[str, Any], call: Call) -> str | None:
        if error.kind != "bad_request" and error.status != 501:
            return None
        field = _culprit(error, body)
        if field is None:
            if (
                error.status not in (400, 422, 501)
                or "response_format" not in body
                or call.no_format
            ):
                return None
            call.no_format = True
            return "response_format"
        if field == "response_format" and _about_the_schema(error):
            self._plain_schemas.add(_key(call.schema))
            return field
        if field in ("max_tokens", "max_completion_tokens"):
            self._limit_field = "max_completion_tokens" if field == "max_tokens" else "max_tokens"
        elif field in ("temperature", "top_p", "seed", "reasoning_effort"):
            log.warning(
                "%s does not take %s; it is left out from now on. (%s)", self.name, field, error
            )
        self.adapted.add(field)
        return field

    def worked(self, call: Call) -> None:
        if call.no_format:
            self.adapted.add("response_format")

    async def read(
        self, response: Response, body: dict[str, Any], call: Call, delivery: Delivery
    ) -> Reply:
        here = call.sampling.stop if "stop" in self.adapted else ()
        reading = Reading(self.endpoint, StopCutter(here), delivery)
        asked = body.get("stream") and response.content_type != "application/json"
        if asked or response.content_type == "text/event-stream":
            async for _, chunk in response.events():
                reading.chunk(chunk)
            if reading.finish is None and not response.done:
                raise self.endpoint.cut()
            if not reading.begun:
                raise self.endpoint.empty()
        else:
            reading.whole(await response.json())
        reading.deliver(reading.stops.flush())
        size = max(reading.room.used, sum(len(m.content) for m in call.messages) // 8)
        asked_in_words = call.tools if "tools" not in body else ()
        reply, usage = await read(size, self._read_out, reading, call.messages, asked_in_words)
        return reply.model_copy(update={"usage": usage, "model": reading.model or self.model})

    def _read_out(
        self, reading: Reading, messages: Sequence[Message], plain_tools: Sequence[ToolSpec]
    ) -> tuple[Reply, Usage]:
        reply = reading.reply(plain_tools)
        return reply, usage_of(self, reading.usage, messages, reading.spoken(), self._tokenizer)


def usage_of(
    lm: LM,
    raw: dict[str, Any],
    messages: Sequence[Message],
    spoken: str,
    tokenizer: Callable[[str], int],
) -> Usage:
    """The usage an endpoint sent, with estimates for what it left out: of the prompt, and of
    `spoken`."""
    spent, made = natural(raw.get("prompt_tokens")), natural(raw.get("completion_tokens"))
    estimated = spent is None or made is None
    if spent is None:
        spent = lm.count_tokens(messages)
    if made is None:
        made = tokenizer(spoken)
    cached = min(
        natural(as_dict(raw.get("prompt_tokens_details")).get("cached_tokens")) or 0, spent
    )
    cost, told = lm.price(spent, made, cached), raw.get("cost")
    if (
        cost is None
        and isinstance(told, int | float)
        and not isinstance(told, bool)
        and 0 <= told < float("inf")
    ):
        cost = float(told)  # some routers say what they charge
    return Usage(
        calls=1,
        input_tokens=spent,
        output_tokens=made,
        cached_tokens=cached,
        cost_usd=cost,
        estimated=estimated,
    )


class Reading:
    """A reply as it comes in, whole or in chunks. Nothing about the shapes is taken on trust."""

    def __init__(self, endpoint: Endpoint, stops: StopCutter, delivery: Delivery):
        self.endpoint, self.stops, self.delivery = endpoint, stops, delivery
        self.finish: str | None = None
        self.begun = False  # there was a choice
        self.refused = False  # the text is the model's refusal
        self.model = ""
        self.usage: dict[str, Any] = {}
        self.room = Room(endpoint)
        self._calls = _Calls()
        self._thoughts: list[str] = []
        self._extra: dict[str, list[Any]] = {}  # reasoning in the endpoint's own fields, in pieces

    def whole(self, value: dict[str, Any]) -> None:
        self._head(value)
        choice = self._choice(value)
        if choice is None:
            if value.get("choices") == []:
                raise self.endpoint.empty()
            shown = self.endpoint.start(self.endpoint.shown(value))
            raise self.endpoint.protocol(f"sent a reply without choices: {shown}")
        self.finish = _string(choice.get("finish_reason")) or "stop"
        self._part(as_dict(choice.get("message")), whole=True)
        self._failed(choice)

    def chunk(self, value: dict[str, Any]) -> None:
        self._head(value)
        choice = self._choice(value)
        if choice is not None:
            self.begun = True
            self._part(
                as_dict(choice.get("delta") or choice.get("message")), whole=not choice.get("delta")
            )
            self.finish = _string(choice.get("finish_reason")) or self.finish
            self._failed(choice)

    def deliver(self, text: str) -> None:
        self.delivery(text)

    def reply(self, plain_tools: Sequence[ToolSpec] = ()) -> Reply:
        """What came in, without usage. `plain_tools`: tools that were asked for in words."""
        text, calls = self.stops.text, self._calls.made()
        if plain_tools and (found := plain.read_tool_calls(text, plain_tools)):
            text, calls = "", found
        finish = "content_filter" if self.refused else (self.finish or "stop").lower()
        finish = FINISH.get(finish, finish)
        if calls and finish == "stop":
            finish = "tool_calls"
        return Reply(
            text=text,
            tool_calls=calls,
            finish_reason=finish
            if finish in ("stop", "length", "tool_calls", "content_filter")
            else "stop",
            extra={name: _joined(pieces) for name, pieces in self._extra.items()} if calls else {},
        )

    def spoken(self) -> str:
        """All text the model produced, for an estimate of its tokens."""
        return "".join([self.stops.text, *self._thoughts, *self._calls.spoken()])

    def _head(self, value: dict[str, Any]) -> None:
        # with status 200: routers, and servers that fail in the middle of a stream
        if value.get("error"):
            raise self._refusal(value["error"])
        self.usage = as_dict(value.get("usage")) or self.usage
        self.model = _string(value.get("model")) or self.model

    def _failed(self, choice: dict[str, Any]) -> None:
        """Raises the error that a choice holds: routers pass on so that the model behind them
        failed."""
        if choice.get("error"):
            raise self._refusal(choice["error"])
        if self.finish == "error":
            raise self.endpoint.refusal(
                502, b'{"error": {"message": "the choice ended in an error"}}'
            )

    def _refusal(self, error: Any) -> EndpointError:
        code = as_dict(error).get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return self.endpoint.refusal(status, self.endpoint.shown({"error": error}))

    @staticmethod
    def _choice(value: dict[str, Any]) -> dict[str, Any] | None:
        choices = value.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        return first if isinstance(first, dict) else None

    def _part(self, part: dict[str, Any], whole: bool) -> None:
        text = content_text(part.get("content"))
        if not text and isinstance(part.get("refusal"), str):
            text, self.refused = part["refusal"], True
        self.room.take(len(text))
        self.deliver(self.stops.push(text))
        self._thoughts += [
            v for v in (part.get("reasoning_content"), part.get("reasoning")) if isinstance(v, str)
        ][:1]
        for name in (*REASONING, "extra_content"):
            if part.get(name):
                self.room.take(size_of(part[name], LARGEST_TEXT + 1))
                self._extra.setdefault(name, []).append(part[name])
        calls = part.get("tool_calls")
        self.room.take(self._calls.part(calls if isinstance(calls, list) else [], whole))


class _Calls:
    """Tool calls out of messages and deltas.

    Servers disagree on how a delta names the call that it continues: by `index`, by `id`, or not at
    all; some send every call whole under index 0, with an empty id, or with one id for all. A piece
    begins another call where it brings another id or name, or a second object of arguments behind a
    finished one.
    """

    # characters read to see whether arguments are finished, in a stream that is made to need many
    CHECKED = 1 << 20

    def __init__(self) -> None:
        self._all: list[_Pieces] = []
        self._at: dict[Any, _Pieces] = {}
        self._checked = 0

    def part(self, calls: list[Any], whole: bool) -> int:
        """Take the calls of a message or delta; how many characters they brought."""
        begun: list[_Pieces] = []  # in this delta
        size = 0
        for position, call in enumerate(map(as_dict, calls)):
            function = as_dict(call.get("function"))
            id, name = _string(call.get("id")) or "", _string(function.get("name")) or ""
            arguments = function.get("arguments")
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments) if arguments else ""
            key = call.get("index")
            if not isinstance(key, int) or isinstance(key, bool):
                key = id or (position if name or not self._all else None)
            held = self._all[-1] if key is None else self._at.get(key)
            if (
                whole
                or held is None
                or (name and any(held is b for b in begun))
                or self._is_another(held, id, name, arguments)
            ):
                held = _Pieces()
                self._all.append(held)
            if name or whole:
                begun.append(held)
            self._at[key] = held
            held.id, held.name = held.id or id, held.name or name
            held.arguments.append(arguments)
            held.keep(call, function)
            size += len(name) + len(arguments)
        return size

    def _is_another(self, held: _Pieces, id: str, name: str, arguments: str) -> bool:
        if id and held.id and id != held.id:
            return True
        if not name or not held.name:
            return False
        if name != held.name:
            return True
        if not arguments.lstrip().startswith("{") or self._checked >= self.CHECKED:
            return False
        before = "".join(held.arguments) or "-"
        self._checked += len(before) + 1_000
        return isinstance(parsed(before), dict)

    def made(self) -> tuple[ToolCall, ...]:
        return with_ids(
            [
                ToolCall(
                    id=c.id, name=c.name, arguments=parsed("".join(c.arguments)), extra=c.extra
                )
                for c in self._all
            ]
        )

    def spoken(self) -> list[str]:
        return [c.name + "".join(c.arguments) for c in self._all]


class _Pieces:
    """One tool call as it comes in."""

    def __init__(self) -> None:
        self.id = self.name = ""
        self.arguments: list[str] = []
        self.extra: dict[str, Any] = {}

    def keep(self, call: dict[str, Any], function: dict[str, Any]) -> None:
        """Fields beyond the standard ones go back with the call, where they were."""
        self.extra |= {
            k: v
            for k, v in call.items()
            if k not in ("id", "index", "type", "function") and v is not None
        }
        more = {
            k: v for k, v in function.items() if k not in ("name", "arguments") and v is not None
        }
        if more:
            self.extra["function"] = as_dict(self.extra.get("function")) | more


_UNSUPPORTED = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|extra (inputs|fields)|"
    r"not implemented|not available|not enabled|requires --|deprecated|use '?max_",
    re.IGNORECASE,
)
_FORMAT = re.compile(
    r"response_format|json_schema|json schema|structured output|guided|grammar", re.IGNORECASE
)
_REASONING = re.compile(r"\breasoning(_content|_details)?\b(?!_effort)", re.IGNORECASE)
_TOOLS = re.compile(r"\btools?\b|function call|tool[_-]choice", re.IGNORECASE)


def _culprit(error: EndpointError, body: dict[str, Any]) -> str | None:
    """The optional field of `body` that a refusal is about; None: no field we could do without."""
    message, named = str(error), (error.param or "").partition(".")[0]
    if "response_format" in body and (named == "response_format" or _FORMAT.search(message)):
        return "response_format"
    if any(m["role"] == "system" for m in body["messages"]) and NO_SYSTEM_ROLE.search(message):
        return "system"
    if not _UNSUPPORTED.search(message) and error.code not in (
        "unsupported_parameter",
        "unsupported_value",
    ):
        return None
    optional = [f for f in (*DROPPABLE, "max_tokens", "max_completion_tokens") if f in body]
    if _REASONING.search(message) and any(f in m for m in body["messages"] for f in REASONING):
        return "reasoning"
    if named in optional:
        return named
    for field in optional:
        if re.search(r"(?i)\bstream(ing|ed)?\b" if field == "stream" else rf"\b{field}\b", message):
            return field
    return (
        "tools"
        if "tools" in body and (named in ("tools", "tool_choice") or _TOOLS.search(message))
        else None
    )


def _about_the_schema(error: EndpointError) -> bool:
    """The endpoint has structured replies, but not for this schema."""
    return error.code == "invalid_json_schema" or "invalid schema" in str(error).lower()


def strict(schema: Any) -> bool:
    """Whether a schema is of the subset that strict structured replies ask for: closed objects, all
    fields required."""
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


def as_openai(message: Message, *, reasoning: bool = True) -> dict[str, Any]:
    """A message in the shape of the OpenAI API. `reasoning`: with the fields its tool calls came
    with."""
    if message.role == "tool":
        return {
            "role": "tool",
            "tool_call_id": message.tool_call_id or "",
            "content": message.content,
        }
    if not message.tool_calls:
        return {"role": message.role, "content": message.content}
    calls = []
    for c in message.tool_calls:
        function = {"name": c.name, "arguments": as_json(c.arguments)}
        call = {
            "id": c.id,
            "type": "function",
            **c.extra,
            "function": as_dict(c.extra.get("function")) | function,
        }
        calls.append(call)
    more = (
        message.extra
        if reasoning
        else {n: v for n, v in message.extra.items() if n not in REASONING}
    )
    return {**more, "role": message.role, "content": message.content or None, "tool_calls": calls}


def openai_tool(tool: ToolSpec) -> dict[str, Any]:
    """A tool in the shape of the OpenAI API."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _joined(pieces: list[Any]) -> Any:
    """The pieces of a streamed field put together again."""
    if all(isinstance(p, str) for p in pieces):
        return "".join(pieces)
    if all(isinstance(p, list) for p in pieces):
        return [item for piece in pieces for item in piece]
    return pieces[-1]


def content_text(content: Any) -> str:
    """Text of a content field: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(
        p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)
    )


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
