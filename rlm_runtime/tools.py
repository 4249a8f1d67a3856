"""User tools: Python functions the models may call, and plain values they may read.

Three ways to give them: to the root (`tools`: names in its REPL), to what the root calls
(`sub_tools`: native tool calls of sub-LMs, names in the REPL of child RLMs), or to both by naming
them twice. A function runs in the host process, never in the sandbox; its arguments arrive as JSON
and are checked against its type hints before it sees them.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import contextvars
import inspect
import keyword
import re
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticSerializationError, to_jsonable_python

from rlm_runtime.errors import RlmError, UsageError
from rlm_runtime.lms import redact
from rlm_runtime.lms.base import ToolSpec
from rlm_runtime.repl.base import ToolInfo

RESERVED = frozenset(
    [
        "context",
        "history",
        "outputs",
        "answer",
        "llm_query",
        "llm_batch",
        "llm_query_batched",
        "rlm_query",
        "rlm_batch",
        "rlm_query_batched",
        "FINAL",
        "FINAL_VAR",
        "SHOW_VARS",
        "CallError",
    ]
)
ERROR_CHARS = 2000


class ToolError(RlmError):
    """A tool was called wrongly, raised, or returned what is not JSON. The message is for the
    model."""


@dataclass(frozen=True)
class Tool:
    """A function or, with `is_value`, a JSON value under a name. `toolbox` makes these from what a
    user passes; make one yourself to give a function another name or description."""

    name: str
    function: Callable[..., Any] | None = None
    description: str | None = None  # None: signature and docstring
    value: Any = None
    is_value: bool = False
    parameters: dict[str, Any] | None = None  # JSON schema of the arguments; None: of the signature
    _adapters: dict[str, TypeAdapter[Any] | None] = field(
        default_factory=dict, repr=False, compare=False
    )

    def info(self) -> ToolInfo:
        """The tool as the REPL shows it."""
        return ToolInfo(
            name=self.name, description=self._about(), value=self.value, is_value=self.is_value
        )

    def spec(self) -> ToolSpec:
        """The tool as a model with native tool calls sees it."""
        return ToolSpec(
            name=self.name, description=self._about(), parameters=self.parameters or self._schema
        )

    async def call(
        self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function with JSON arguments; its JSON result. Raises ToolError.

        A function that is not `async` runs in a thread of its own: it cannot stop the event loop,
        and one that never returns does not stop the run from ending (its thread, a daemon, stays
        behind with it)."""
        if self.function is None:
            return self.value
        bound = self._bind(args, kwargs or {})
        try:
            if _is_async(self.function):
                result = await self.function(*bound.args, **bound.kwargs)
            else:
                result = await _in_thread(self.name, self.function, bound.args, bound.kwargs)
                if inspect.isawaitable(result):
                    result = await result
        except (Exception, SystemExit) as e:
            raise ToolError(
                f"{self.name}: {type(e).__name__}: {_short(redact.foreign(str(e)))}"
            ) from e
        try:
            return to_jsonable_python(result)
        except (PydanticSerializationError, UnicodeDecodeError, RecursionError, ValueError) as e:
            raise ToolError(
                f"{self.name} returned {type(result).__name__}, which is not JSON: {_short(str(e))}"
            ) from e

    async def call_named(self, arguments: Any) -> Any:
        """As `call`, with the arguments object of a native tool call. Raises ToolError."""
        if not isinstance(arguments, dict):
            raise ToolError(
                f"{self.name}: the arguments must be one JSON object, got: {_short(str(arguments), 200)}"
            )
        args, kwargs = [], dict(arguments)
        for p in self._signature.parameters.values():
            if p.kind is p.POSITIONAL_ONLY and p.name in kwargs:
                args.append(kwargs.pop(p.name))
            elif p.kind is p.VAR_POSITIONAL and isinstance(kwargs.get(p.name), list):
                args.extend(kwargs.pop(p.name))
        return await self.call(tuple(args), kwargs)

    # -- signature ---------------------------------------------------------------------------------
    @cached_property
    def _signature(self) -> inspect.Signature:
        try:
            return inspect.signature(self.function)  # type: ignore[arg-type]  # None: refused like a builtin
        except (TypeError, ValueError):  # some builtins have none
            anything = inspect.Parameter
            return inspect.Signature(
                [
                    anything("args", anything.VAR_POSITIONAL),
                    anything("kwargs", anything.VAR_KEYWORD),
                ]
            )

    @cached_property
    def _hints(self) -> dict[str, Any]:
        target = (
            self.function
            if inspect.isroutine(self.function)
            else getattr(self.function, "__call__", None)  # noqa: B004
        )
        try:
            return typing.get_type_hints(target, include_extras=True)
        # a hint that names what only exists inside a function: such a parameter takes anything
        except Exception:
            return {
                p.name: p.annotation
                for p in self._signature.parameters.values()
                if not isinstance(p.annotation, str)
            }

    def _hint(self, parameter: inspect.Parameter) -> Any:
        hint = self._hints.get(parameter.name, Any)
        return Any if hint is inspect.Parameter.empty else hint

    def _adapter(self, parameter: inspect.Parameter) -> TypeAdapter[Any] | None:
        if parameter.name not in self._adapters:
            try:
                self._adapters[parameter.name] = TypeAdapter(self._hint(parameter))
            # a type pydantic does not know: handed over unchecked
            except (PydanticUserError, TypeError, NameError):
                self._adapters[parameter.name] = None
        return self._adapters[parameter.name]

    def _bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as e:
            raise ToolError(f"{self.name}{self._signature}: {e}") from e
        for name, value in bound.arguments.items():
            parameter = self._signature.parameters[name]
            adapter = self._adapter(parameter)
            if adapter is None:
                continue
            try:
                if parameter.kind is parameter.VAR_POSITIONAL:
                    bound.arguments[name] = tuple(adapter.validate_python(v) for v in value)
                elif parameter.kind is parameter.VAR_KEYWORD:
                    bound.arguments[name] = {
                        k: adapter.validate_python(v) for k, v in value.items()
                    }
                else:
                    bound.arguments[name] = adapter.validate_python(value)
            except ValidationError as e:
                wrong = "; ".join(
                    err["msg"] for err in e.errors(include_url=False, include_input=False)[:3]
                )
                raise ToolError(f"{self.name}{self._signature}: argument {name!r}: {wrong}") from e
        return bound

    @cached_property
    def _schema(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        open_ended = False
        for p in self._signature.parameters.values():
            if p.kind is p.VAR_KEYWORD:
                open_ended = True
                continue
            hint = self._hint(p) if self._adapter(p) is not None else Any
            if p.kind is p.VAR_POSITIONAL:
                fields[p.name] = (types.GenericAlias(list, hint), [])
            else:
                fields[p.name] = (hint, ... if p.default is p.empty else p.default)
        try:
            config = ConfigDict(
                arbitrary_types_allowed=True, extra="allow" if open_ended else "forbid"
            )
            made: type[BaseModel] = create_model("Arguments", __config__=config, **fields)
            schema = made.model_json_schema()
        # a name or a type without a JSON schema: names and what is required, no types
        except Exception:
            required = [p for p, (_, default) in fields.items() if default is ...]
            schema = {
                "type": "object",
                "properties": {name: {} for name in fields},
                "required": required,
            }
        schema.pop("title", None)
        schema.setdefault("properties", {})
        return schema

    def _about(self) -> str:
        if self.description is not None:
            return self.description
        if self.is_value:
            return f"a value ({type(self.value).__name__})"
        kind = "async def" if _is_async(self.function) else "def"
        doc = inspect.getdoc(self.function) or ""
        # The models call it plainly: that it is async matters in the host only.
        return f"{kind.removeprefix('async ')} {self.name}{self._signature}" + (
            f"\n{doc}" if doc else ""
        )


Tools = Iterable[Callable[..., Any] | Tool] | Mapping[str, Any]


def toolbox(tools: Tools | None, where: str = "tools") -> dict[str, Tool]:
    """The tools by name: from functions (named after themselves), `Tool`s, or a mapping of names to
    functions, `Tool`s or JSON values. Raises UsageError: a name that is reserved, taken, or no
    Python name; a value that is no JSON."""
    if tools is None:
        return {}
    if callable(tools) or isinstance(tools, str):
        raise UsageError(
            f"{where}: expected a list of functions or a dict of names, got {tools!r}; put it in a list."
        )
    if isinstance(tools, Mapping):
        pairs = [(name, thing) for name, thing in tools.items()]
    else:
        pairs = [
            (getattr(thing, "name", None) or getattr(thing, "__name__", None), thing)
            for thing in tools
        ]
    box: dict[str, Tool] = {}
    for name, thing in pairs:
        tool = _tool(name, thing, where)
        if tool.name in box:
            raise UsageError(f"{where}: two tools are called {tool.name!r}.")
        box[tool.name] = tool
    return box


def _tool(name: Any, thing: Any, where: str) -> Tool:
    if isinstance(thing, Tool):
        tool = thing if name == thing.name else replace(thing, name=name)
        _check_name(tool.name, where)
        if not tool.is_value and not callable(tool.function):
            raise UsageError(f"{where}: {tool.name!r} has neither a function nor is_value=True.")
        return tool
    if callable(thing):
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(
                f"{where}: {thing!r} has no usable name; pass it as {{'name': function}} or Tool(name, function)."
            )
        _check_name(name, where)
        return Tool(name, thing)
    if name is None:
        raise UsageError(
            f"{where}: {type(thing).__name__} is not a function; pass a value under a name: {{'name': value}}."
        )
    _check_name(name, where)
    try:
        return Tool(name, value=to_jsonable_python(thing), is_value=True)
    except (PydanticSerializationError, UnicodeDecodeError, RecursionError, ValueError) as e:
        raise UsageError(
            f"{where}: the value {name!r} ({type(thing).__name__}) is neither a function nor JSON: {e}"
        ) from e


def _check_name(name: Any, where: str) -> None:
    if (
        not isinstance(name, str)
        or not name.isidentifier()
        or keyword.iskeyword(name)
        or name.startswith("__")
    ):
        raise UsageError(
            f"{where}: {name!r} cannot be the name of a tool; use a plain Python name."
        )
    if name in RESERVED or re.fullmatch(r"(context|history)_\d+", name):
        raise UsageError(
            f"{where}: {name!r} is a name of the runtime; choose another. Reserved: {', '.join(sorted(RESERVED))}."
        )
    if hasattr(builtins, name):
        raise UsageError(
            f"{where}: {name!r} would hide Python's own {name!r} in the REPL; choose another name."
        )


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


async def _in_thread(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Not `asyncio.to_thread`: its pool is small and the loop waits for it when it closes, so one
    tool that hangs would hang the run."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[bool, Any]] = loop.create_future()
    context = contextvars.copy_context()

    def hand_over(outcome: tuple[bool, Any]) -> None:
        if not done.done():
            done.set_result(outcome)

    def work() -> None:
        try:
            outcome = (True, context.run(function, *args, **kwargs))
        except BaseException as e:
            outcome = (False, e)
        # the loop is closed: the run ended without this tool
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(hand_over, outcome)

    threading.Thread(target=work, name=f"rlm-tool-{name}", daemon=True).start()
    good, value = await done
    if good:
        return value
    raise (
        value if isinstance(value, Exception) else RuntimeError(f"{type(value).__name__}: {value}")
    )


def _short(text: str, chars: int = ERROR_CHARS) -> str:
    return text if len(text) <= chars else text[:chars] + " …"
