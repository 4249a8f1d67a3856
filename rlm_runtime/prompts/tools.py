"""The user's tools as the prompt lists them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from rlm_runtime.repl.base import ToolInfo


def describe_function(function: Callable[..., Any], name: str | None = None) -> str:
    """Signature on the first line, docstring below it."""
    name = name or getattr(function, "__name__", type(function).__name__)
    try:
        signature = str(inspect.signature(function))
    except (TypeError, ValueError):  # some built-in functions have none
        signature = "(...)"
    doc = inspect.getdoc(function) or ""
    return f"{name}{signature}\n{doc}".rstrip()


def describe_tools(tools: Iterable[ToolInfo]) -> str:
    """One entry a tool: what to write in code, then what it does, indented."""
    return "\n".join(_entry(tool) for tool in tools)


def _entry(tool: ToolInfo) -> str:
    head, _, body = tool.description.strip().partition("\n")
    head = head.removeprefix("async ").removeprefix("def ").rstrip(":")
    if not head.startswith(tool.name):  # a description in words
        head, body = tool.name if tool.is_value else f"{tool.name}(...)", tool.description.strip()
    body = inspect.cleandoc(body).strip()
    if "\n" not in body:
        return f"- `{head}`" + (f": {body}" if body else "")
    return f"- `{head}`\n" + "\n".join(f"  {line}".rstrip() for line in body.split("\n"))
