"""Structured replies and tool calls for models and endpoints that have neither: asked for in words.

Used where an endpoint refuses `response_format` or `tools`, and for checkpoints. The request goes
after the messages, so their prefix stays what it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rlm_runtime.lms.base import Message, ToolCall, ToolSpec
from rlm_runtime.replies import model_json
from rlm_runtime.replies.thinking import clean

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)


def with_schema(messages: Sequence[Message], schema: dict[str, Any]) -> list[Message]:
    """The messages, and that the reply must be JSON of this schema."""
    return _ask(
        messages,
        "Reply with one JSON value and nothing else (no fence, no comment). It must satisfy this JSON schema:\n"
        + json.dumps(schema, ensure_ascii=False),
    )


def with_tools(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Message]:
    """The messages, and how to call the tools; earlier tool calls and their results as plain
    text."""
    lines = [json.dumps(tool.model_dump(), ensure_ascii=False) for tool in tools]
    return _ask(
        [as_text(m) for m in messages],
        "You may call a tool. To call one, reply with nothing but a JSON object of this form:\n"
        '{"tool": "NAME", "arguments": {...}}\n'
        "You will then be given its result. When you need no tool, reply as usual. The tools:\n"
        + "\n".join(lines),
    )


def as_text(message: Message) -> Message:
    """A message without the parts only a tool-calling endpoint understands."""
    if message.role == "tool":
        return Message(role="user", content=f"Result of the tool call:\n{message.content}")
    if message.tool_calls:
        calls = [
            json.dumps({"tool": c.name, "arguments": c.arguments}, ensure_ascii=False)
            for c in message.tool_calls
        ]
        return Message(role="assistant", content="\n".join(filter(None, [message.content, *calls])))
    return message


def read_tool_calls(text: str, tools: Sequence[ToolSpec]) -> tuple[ToolCall, ...]:
    """The call a reply to `with_tools` makes; empty where the reply is anything else."""
    bare = clean(text).text.strip()
    fenced = _FENCE.match(bare)
    found = model_json.loads(fenced[1] if fenced else bare)
    value = found[0] if found is not None else None
    if not isinstance(value, dict) or value.get("tool") not in [t.name for t in tools]:
        return ()
    arguments = value.get("arguments", {})
    return (
        ToolCall(
            id="call_0",
            name=value["tool"],
            arguments=arguments if isinstance(arguments, dict) else {},
        ),
    )


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The messages for a model without a system role: what the system said begins the first user
    message."""
    said = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
    rest = [m for m in messages if m.role != "system"]
    if not said:
        return rest
    if rest and rest[0].role == "user":
        joined = f"{said}\n\n{rest[0].content}" if rest[0].content else said
        return [rest[0].model_copy(update={"content": joined}), *rest[1:]]
    return [Message(role="user", content=said), *rest]


def _ask(messages: Sequence[Message], text: str) -> list[Message]:
    """Append `text` to the last message if it is the user's, else as a user message of its own."""
    *rest, last = messages or [Message(role="user")]
    if last.role == "user":
        joined = f"{last.content}\n\n{text}" if last.content else text
        return [*rest, last.model_copy(update={"content": joined})]
    return [*rest, last, Message(role="user", content=text)]
