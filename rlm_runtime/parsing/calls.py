"""Tool calls, native or written out as JSON or XML, turned into the cell they stand for."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlm_runtime.parsing import nudges
from rlm_runtime.parsing.python import Effort, is_code, outside_strings, parses, repaired, words
from rlm_runtime.replies import model_json

RUNNERS = words(
    "python repl code py exec execute run ipython jupyter interpreter code_interpreter python_repl python_interpreter "
    "run_python run_code run_cell run_python_code execute_code execute_python execute_python_code execute_cell exec_code "
    "exec_python python_exec repl_exec run_repl call_python_repl call_repl tool_code cell python_code python3 "
    "code_execution python_tool repl_tool notebook"
)
HELPERS = words(
    "llm_query llm_batch llm_query_batched rlm_query rlm_batch rlm_query_batched SHOW_VARS"
)
FINISHERS = words("final final_var final_answer answer submit submit_answer finish")
CODE_KEYS = (
    "code",
    "source",
    "script",
    "python",
    "python_code",
    "cell",
    "command",
    "cmd",
    "program",
    "snippet",
    "input",
)
NAME_KEYS = ("name", "tool", "tool_name", "function_name", "action", "recipient_name")
ARGUMENT_KEYS = (
    "arguments",
    "parameters",
    "args",
    "input",
    "action_input",
    "kwargs",
    "params",
    "tool_input",
)


@dataclass(frozen=True)
class CallReading:
    """What a call came to: a cell, or a nudge. `sound` is False where its JSON was broken (perhaps
    cut off)."""

    code: str | None = None
    nudge: nudges.Nudge | None = None
    sound: bool = True


def cell(name: str, arguments: Any, effort: Effort, tools: Collection[str] = ()) -> CallReading:
    """The cell a call of `name` stands for. `arguments` is an object, or text where no JSON could
    be read from it."""
    short = re.split(r"[.:/]|__", name.strip())[-1] or name.strip()
    sound = True
    if isinstance(arguments, str):
        arguments, sound = _read(arguments, effort)
    if not isinstance(arguments, dict):
        arguments = {"code": arguments} if isinstance(arguments, str) else {}
    if isinstance(arguments.get("code"), list) and all(
        isinstance(line, str) for line in arguments["code"]
    ):
        arguments = {**arguments, "code": "\n".join(arguments["code"])}
    helper = next((n for n in (name, short) if n in tools or n in HELPERS), None)
    if helper is not None and helper.isidentifier():
        return CallReading(_called(helper, arguments), sound=sound)
    low = short.lower()
    if low in FINISHERS and arguments:
        value = next(
            (arguments[k] for k in ("answer", "content", "value", "result") if k in arguments), None
        )
        if value is None:
            value = next(iter(arguments.values()))
        made = (
            f"FINAL_VAR({value!r})"
            if low == "final_var" and isinstance(value, str)
            else f"FINAL({value!r})"
        )
        return CallReading(made, sound=sound)
    keys = CODE_KEYS if low in RUNNERS else CODE_KEYS[:5]
    code = next((arguments[k] for k in keys if isinstance(arguments.get(k), str)), None)
    if code is None and low in RUNNERS and len(arguments) == 1:
        code = next((v for v in arguments.values() if isinstance(v, str)), None)
    if code is not None and code.strip():
        return CallReading(repaired(unfenced(code), effort), sound=sound)
    return CallReading(
        nudge=nudges.bad_call(name)
        if low in RUNNERS or code is not None
        else nudges.unknown_tool(name)
    )


def _called(name: str, arguments: dict[str, Any]) -> str:
    good = all(
        isinstance(k, str) and k.isidentifier() and not keyword.iskeyword(k) for k in arguments
    )
    inside = ", ".join(f"{k}={v!r}" for k, v in arguments.items()) if good else f"**{arguments!r}"
    return f"print({name}({inside}))"


def unfenced(code: str) -> str:
    """Code without a fence around the whole of it."""
    bare = code.strip()
    found = re.match(r"(`{3,16}+|~{3,16}+)[ \t]*+[\w.+-]*+[ \t]*+\n", bare)
    if found and bare.endswith(found[1]) and len(bare) > found.end():
        return bare[found.end() : -len(found[1])].removesuffix("\n")
    return code


def _read(text: str, effort: Effort) -> tuple[Any, bool]:
    """Arguments that came as text: JSON, JSON in JSON, broken JSON with a code string in it, or
    just code."""
    value: Any = None
    for _ in range(3):
        value = loads(text, effort)
        if not isinstance(value, str):
            break
        text = value
    if isinstance(value, dict | list):
        return value, True
    if text.strip() and "{" not in text[:1] and parses(text, effort):
        return {"code": text}, True
    code = broken_string(text, effort)
    if code is None and text.strip() and not text.lstrip().startswith("{"):
        return {"code": text}, True
    return ({} if code is None else {"code": code}), False


def loads(text: str, effort: Effort) -> Any:
    """The JSON value that a text is; None where it is none."""
    found = model_json.loads(text, effort)
    return None if found is None else found[0]


CODE_STRING = re.compile(
    r"""["'](?:code|source|script|python|cell|command|input)["'][ \t\n]*+:[ \t\n]*+(\"\"\"|'''|["'`])"""
)
ESCAPES = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    '"': '"',
    "'": "'",
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
}


def broken_string(text: str, effort: Effort) -> str | None:
    """The code in broken JSON: from the code key's quote to the last such quote (or the end, where
    it was cut off)."""
    found = CODE_STRING.search(text)
    if found is None:
        return None
    body = text[found.end() :]
    last = body.rfind(found[1])
    tail = body[last + len(found[1]) :] if last >= 0 else None
    closed = tail is not None and not tail.strip(" \t\n}])>,;")
    raw = body[:last] if closed else body
    plain = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", _unescape, raw, flags=re.S)
    return raw if found[1] != '"' and parses(raw, effort) and not parses(plain, effort) else plain


def _unescape(found: re.Match[str]) -> str:
    return chr(int(found[1], 16)) if found[1] else ESCAPES.get(found[2], found[0])


def from_json(value: Any) -> list[tuple[str, Any]]:
    """(name, arguments) of the call or calls that a JSON value spells out; empty where it spells
    out none."""
    if isinstance(value, list):
        found = [from_json(item) for item in value[:64]]
        return [call for calls in found for call in calls] if found and all(found) else []
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("tool_calls"), list):
        return from_json(value["tool_calls"])
    for key in ("function", "function_call", "tool_call"):
        if isinstance(value.get(key), dict):
            return from_json(value[key])
    name = next((value[k] for k in NAME_KEYS if isinstance(value.get(k), str)), None)
    if name is None and isinstance(value.get("function"), str):
        name = value["function"]
    if name is None:
        return (
            [("python", value)] if set(value) == {"code"} and isinstance(value["code"], str) else []
        )
    arguments = next(
        (value[k] for k in ARGUMENT_KEYS if isinstance(value.get(k), dict | str)), None
    )
    if arguments is None:
        arguments = {k: v for k, v in value.items() if k in CODE_KEYS}
        if not arguments:
            return []
    return [(name, arguments)]


PARAMETER = re.compile(r"""<(?:antml:)?parameter(?:[ ]name=["']?|=)(\w{1,80})["']?[^>\n]{0,40}>""")
PARAMETER_END = re.compile(
    r"</(?:antml:)?parameter>|<(?:antml:)?parameter[ =]|</(?:antml:)?(?:invoke|function|tool_call)>"
)
PAIR = re.compile(r"<arg_key>(.{1,80}?)</arg_key>\s*+<arg_value>(.*?)(?:</arg_value>|\Z)", re.S)
NAMED = re.compile(
    r"""<(?:antml:)?(?:invoke|function|tool)(?:[ ]name=["']?|=)([\w.:-]{1,80})["']?[ ]*+>"""
)


def from_xml(text: str, effort: Effort) -> list[tuple[str, Any]]:
    """(name, arguments) of the call spelled out in `text`, the inside of a tool-call tag."""
    bare = unfenced(text).strip()
    if bare[:1] in ("{", "["):
        decoded = model_json.loads(bare, effort) or model_json.raw_decode(bare, 0, effort)
        if decoded is not None:
            return from_json(decoded[0])
        name = re.search(r"""["'](?:name|tool)["']\s*+:\s*+["'](\w{1,80})["']""", bare)
        return [(name[1] if name else "python", bare)]
    first, _, rest = bare.partition("\n")
    if first.strip().lower() in RUNNERS and rest.strip() and "<arg_key>" not in rest[:200]:
        return [(first.strip(), rest)]
    if parses(bare, effort) and is_code(bare, effort):
        return [("python", text.strip("\n"))]
    named: list[tuple[str, object]] = []
    at = 0
    parameter = PARAMETER.search(text)
    # the call's name stands in its tag
    if parameter is not None and not NAMED.search(text, 0, parameter.start()):
        at = len(text)
    opening = NAMED.search(text, at)
    while len(named) < 64 and effort.left > 0 and opening is not None:
        parameters, at = _parameters(text, effort, opening.end())
        following = NAMED.search(text, at)
        named.append(
            (
                opening[1],
                parameters or text[opening.end() : following.start() if following else None],
            )
        )
        opening = following
    if named:
        return named
    parameters, _ = _parameters(text, effort)
    if parameters:
        name = re.match(r"\s*+([\w.:-]{1,80})", text)
        return [(name[1] if name else "python", parameters)]
    return [("python", text.strip("\n"))] if is_code(unfenced(bare), effort) else []


def _parameters(text: str, effort: Effort, at: int = 0) -> tuple[dict[str, str], int]:
    """The parameters from `at` to the next call that has a name of its own, and where they end."""
    found: dict[str, str] = {}
    if text.find("<arg_key>", at) >= 0:
        found = {m[1].strip(): m[2] for m in islice(PAIR.finditer(text, at), 64)}
        effort.spend(len(text) - at)
    while len(found) < 64 and effort.left > 0:
        opening = PARAMETER.search(text, at)
        effort.spend((opening.end() if opening else len(text)) - at)
        if opening is None or NAMED.search(text, at, opening.start()):
            break
        start = opening.end()
        at = parameter_end(text, start, effort)
        found[opening[1]] = text[start:at]
    return {name: value.removeprefix("\n").removesuffix("\n") for name, value in found.items()}, at


def parameter_end(text: str, start: int, effort: Effort) -> int:
    """Where the value that starts at `start` ends; a closing tag inside a string of the code is not
    the end."""
    first = PARAMETER_END.search(text, start)
    if first is None or effort.left <= 0:
        effort.spend((first.start() if first else len(text)) - start)
        return first.start() if first else len(text)
    outside = outside_strings(text, start, len(text), PARAMETER_END.finditer(text, start))
    effort.spend((outside.start() if outside else len(text)) - start)
    if outside is None or (
        outside.start() != first.start() and not parses(text[start : outside.start()], effort)
    ):
        return first.start()
    return outside.start()
