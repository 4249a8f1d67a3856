"""Tools of MCP servers, through the official `mcp` client (`pip install ".[mcp]"`).

    with MCPTools(["uvx", "mcp-server-time"]) as tools:
        RLM("openai:gpt-5-mini", tools=tools).completion("", "What time is it in Lima?")

The server is not confined: it runs with your rights, or elsewhere. It gets the arguments that a
model chose, and none of this process' environment but PATH, HOME and the like.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import keyword
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from rlm_runtime.errors import RlmError, UsageError
from rlm_runtime.tools import Tool

TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
PAGES = 100  # of a server's list of tools
JOIN_SECONDS = 15.0


class MCPTools:
    """The tools of one MCP server, as a context manager (`with` or `async with`) that gives a list
    of `Tool`.

    Args:
      server: a command as a list of words, the URL of a server that speaks streamable HTTP, the
        usual configuration object (`{"command": ..., "args": [...], "env": {...}}` or `{"url":
        ...}`), or whatever `mcp.Client` takes.
      names: which of its tools; default: all.
      prefix: put before the tools' names, for servers whose names clash.
      timeout: seconds for the start, and for one call.

    The connection has a thread of its own, so the tools work in synchronous and asynchronous runs
    alike.
    Raises:
      UsageError: the package is missing, the server cannot be started or reached, it lacks a name.
    """

    def __init__(
        self,
        server: Any,
        *,
        names: Collection[str] | None = None,
        prefix: str = "",
        timeout: float = 60.0,
    ):
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise UsageError('MCP tools need the package mcp: pip install ".[mcp]".') from None
        self._server, self._names, self._prefix, self._timeout = server, names, prefix, timeout
        self._thread: threading.Thread | None = None

    def __enter__(self) -> list[Tool]:
        ready: Future[list[Any]] = Future()
        self._thread = threading.Thread(
            target=self._main, args=(ready,), name="rlm-mcp", daemon=True
        )
        self._thread.start()
        try:
            listed = ready.result(self._timeout)
        except Exception as e:
            self.__exit__()
            cause = _innermost(e)
            why = "no answer" if isinstance(e, TimeoutError) else f"{type(cause).__name__}: {cause}"
            raise UsageError(
                f"the MCP server {_shown(self._server)} cannot be used: {why}"
            ) from cause
        wanted = [t.name for t in listed] if self._names is None else list(self._names)
        by_name = {t.name: t for t in listed}
        for name in wanted:
            if name not in by_name:
                self.__exit__()
                raise UsageError(
                    f"the MCP server {_shown(self._server)} has no tool {name!r}; it has {', '.join(by_name) or 'none'}."
                )
        return [self._tool(by_name[name]) for name in wanted]

    def __exit__(self, *exc: object) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(JOIN_SECONDS)

    async def __aenter__(self) -> list[Tool]:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.__exit__)

    # -- the connection ----------------------------------------------------------------------------
    def _main(self, ready: Future[list[Any]]) -> None:
        async def serve() -> None:
            from mcp import Client

            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            async with Client(_target(self._server)) as self._client:
                tools: list[Any] = []
                cursor = None
                for _ in range(PAGES):
                    page = await self._client.list_tools(cursor=cursor)
                    tools += page.tools
                    cursor = page.next_cursor
                    if cursor is None:
                        break
                ready.set_result(tools)
                await self._stop.wait()

        try:
            asyncio.run(serve())
        except BaseException as e:  # the caller waits for it
            if not ready.done():
                ready.set_exception(e if isinstance(e, Exception) else RlmError(str(e)))

    async def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        if self._thread is None or not self._thread.is_alive():
            raise RlmError("the MCP server is closed.")
        asked = self._client.call_tool(name, arguments, read_timeout_seconds=self._timeout)
        return _value(
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, self._loop))
        )

    def _tool(self, listed: Any) -> Tool:
        schema = listed.input_schema or {"type": "object", "properties": {}}
        signature = _signature(schema)

        async def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            extra = bound.arguments.pop("more", {})
            return await self._call(listed.name, {**bound.arguments, **extra})

        name = self._prefix + _identifier(listed.name)
        call.__signature__ = signature  # type: ignore[attr-defined]
        about = f"def {name}{signature}\n{listed.description or ''}".rstrip()
        return Tool(name, call, about, parameters=schema)


def _target(server: Any) -> Any:
    """What `mcp.Client` takes."""
    from mcp import StdioServerParameters

    if isinstance(server, Mapping):
        if isinstance(server.get("url"), str):
            return server["url"]
        known = {k: server[k] for k in ("command", "args", "env", "cwd") if k in server}
        return StdioServerParameters(**known)
    if isinstance(server, Sequence) and not isinstance(server, str):
        return StdioServerParameters(command=server[0], args=list(server[1:]))
    return server


def _shown(server: Any) -> str:
    """The server without arguments and variables, which may hold keys."""
    if isinstance(server, Mapping):
        return str(server.get("url") or server.get("command"))
    if isinstance(server, Sequence) and not isinstance(server, str):
        return str(server[0]) if server else "(no command)"
    return server if isinstance(server, str) else type(server).__name__


def _signature(schema: Mapping[str, Any]) -> inspect.Signature:
    """The arguments as Python shows them: required ones first; names that Python cannot write go
    into `more`."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = [n for n in schema.get("required") or () if n in properties]
    plain, more = [], False
    for name in [*required, *(n for n in properties if n not in required)]:
        if not name.isidentifier() or keyword.iskeyword(name) or name == "more":
            more = True
            continue
        about = properties[name] if isinstance(properties[name], Mapping) else {}
        kind = about.get("type")
        default = inspect.Parameter.empty if name in required else about.get("default")
        plain.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=TYPES.get(kind, Any) if isinstance(kind, str) else Any,
            )
        )
    rest = [inspect.Parameter("more", inspect.Parameter.VAR_KEYWORD)] if more else []
    return inspect.Signature([*plain, *rest])


def _identifier(name: str) -> str:
    plain = "".join(c if c.isidentifier() or c.isdigit() else "_" for c in name)
    return plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"tool_{plain}"


def _value(result: Any) -> Any:
    """A tool's result as JSON: its structured content, else its text. Raises RlmError for an error
    of the tool."""
    parts = [_part(c) for c in result.content]
    texts = [p for p in parts if isinstance(p, str)]
    if result.is_error:
        raise RlmError("\n".join(texts) or "the tool failed.")
    structured = result.structured_content
    if structured is not None:
        wrapped = isinstance(structured, Mapping) and set(structured) == {"result"}
        return structured["result"] if wrapped else structured
    return "\n".join(texts) if len(texts) == len(parts) else parts


def _part(content: Any) -> Any:
    text = getattr(content, "text", None) or getattr(
        getattr(content, "resource", None), "text", None
    )
    return text if isinstance(text, str) else json.loads(content.model_dump_json(exclude_none=True))


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
