"""Frames from the worker, read as what they are: bytes written by somebody hostile.

A frame is one JSON object on a line. Bounds come before the parser: length, nesting, number of
values. What does not hold them is `Bad`, which costs its sender and nobody else: the next line is
read as if nothing had been.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from pydantic import ValidationError

from rlm_runtime.repl.base import Answer, CellError, Request
from rlm_runtime.replies import pieces

DEPTH = 100
VALUES = 200_000  # commas, colons and brackets of one frame: what the decoder makes in some 50 ms
BARE = 8 << 20  # bytes of one frame outside of strings
DIGITS = 1_100  # in a row
VARIABLES, NAME, DESCRIPTION = 220, 200, 300
MORE_VARIABLES = "more variables; SHOW_VARS() lists all"
MESSAGE, TRACEBACK = 4_000, 10_000

_not_brackets = bytes(set(range(256)) - set(b"[]{}"))
_step = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}
_digits = bytes.maketrans(b"123456789", b"000000000")
# What a variable is, in words that stand among the runtime's own: a type's name and a size, and no
# sentence.
_described = re.compile(
    r"[\w.]+(, [\d,]+ (items|characters|bytes))?|array of shape \([\d, ]*\), \S{1,40}"
)
# One that stands alone, before pairs are told from it: an emoji is a pair.
_surrogate = re.compile(rb"\\u[dD][89a-fA-F]")
_pair = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


class Bad(ValueError):
    """A frame that is not one; the message says why."""


class Lines:
    """Splits what arrives into lines of at most `limit` bytes. A longer one is dropped as it comes,
    and counted."""

    def __init__(self, limit: int):
        self._limit, self._buffer, self._searched, self._dropping = limit, bytearray(), 0, False
        self.dropped = 0

    def take_dropped(self) -> int:
        dropped, self.dropped = self.dropped, 0
        return dropped

    @property
    def held(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> bytes | None:
        """The next line that is not empty, without its end; None where more has to come."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._buffer)
                if self._searched > self._limit:
                    self._buffer, self._searched, self._dropping = bytearray(), 0, True
                return None
            line = (
                bytes(memoryview(self._buffer)[:end])
                if end <= self._limit and not self._dropping
                else None
            )
            del self._buffer[: end + 1]
            self._searched = 0
            if line is None:
                self._dropping = False
                self.dropped += 1
            elif line:
                return line


def encode(message: dict[str, Any]) -> bytes:
    """A message to the worker."""
    return pieces.dumps(message) + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The object of a line; every string in it is valid Unicode. No step takes long. Raises Bad."""
    _check(line)
    try:
        long = len(line) > pieces.PIECE
        text = line.decode("ascii" if long else "utf-8")  # workers write ASCII
        message = pieces.loads(text, _scan) if long else _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise Bad(f"not JSON: {str(error)[:100]}") from None
    if not isinstance(message, dict):
        raise Bad("not an object")
    alone = not long and _surrogate.search(line) and _surrogate.search(_pair.sub(b"", line))
    return clean(message) if alone else message


def _check(line: bytes) -> None:
    """Raises Bad for what would cost the decoder too much. Where the line is no JSON, right up to
    the place at which a decoder stops."""
    size = values = depth = 0
    digits = b""
    for bare in outside_strings(line):
        size += len(bare)
        values += sum(map(bare.count, (b",", b":", b"[", b"{")))
        if size > BARE:
            raise Bad(f"more than {BARE >> 20} MiB outside of strings")
        if values > VALUES:
            raise Bad(f"more than {VALUES:,} values")
        for step in map(_step.__getitem__, bare.translate(None, _not_brackets)):
            depth += step
            if depth > DEPTH:
                raise Bad(f"nested deeper than {DEPTH}")
        digits += bare.translate(_digits)
        if b"0" * DIGITS in digits:
            raise Bad(f"a number of more than {DIGITS} digits")
        digits = digits[-DIGITS:]


def outside_strings(line: bytes) -> Iterator[bytes]:
    """The line without its strings, in parts. Raises Bad."""
    at = quotes = 0
    while at < len(line):
        part = line[at : at + pieces.PIECE]
        # an escape stays whole
        if part.endswith(b"\\") and (len(part) - len(part.rstrip(b"\\"))) % 2:
            part = line[at : at + pieces.PIECE + 1]
        at += len(part)
        if b"\\" in part:
            part = part.replace(b"\\\\", b"").replace(b'\\"', b"")
        inside = quotes % 2
        quotes += part.count(b'"')
        if quotes > 2 * VALUES:
            raise Bad(f"more than {VALUES:,} strings")
        yield b"".join(part.split(b'"')[inside::2])


def _constant(name: str) -> NoReturn:
    raise Bad(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if value - value != 0.0:
        raise Bad("a number beyond all bounds")
    return value


_decoder = json.JSONDecoder(parse_constant=_constant, parse_float=_float)
_scan: pieces.Scan = _decoder.scan_once  # type: ignore[attr-defined]  # not in the stubs


def clean(value: Any) -> Any:
    """The same with every lone surrogate turned into "?", so that all text can be written as
    UTF-8."""
    if isinstance(value, str):
        return pieces.valid(value)
    if isinstance(value, list):
        return [clean(v) for v in value]
    if isinstance(value, dict):
        return {clean(k): clean(v) for k, v in value.items()}
    return value


def cut(value: str, limit: int) -> str:
    """At most about `limit` characters, the middle taken out."""
    if len(value) <= limit:
        return value
    front, back = limit - limit // 2, limit // 2
    end = value[-back:] if back else ""
    return f"{value[:front]}\n[... {len(value) - front - back:,} characters hidden ...]\n{end}"


# -- what each message must look like


def number_of(message: dict[str, Any]) -> tuple[int, int]:
    """A request's number and how many calls it makes. Raises Bad."""
    number, prompts = message.get("id"), message.get("prompts", [])
    if type(number) is not int or not 0 < number < 1 << 53:
        raise Bad("a request without a number")
    if not isinstance(prompts, list):
        raise Bad("prompts that are no list")
    return number, max(len(prompts), 1)


def request_of(message: dict[str, Any]) -> Request:
    """Raises Bad."""
    fields = {k: v for k, v in message.items() if k not in ("t", "cell", "id")}
    if "schema" in fields:
        fields["schema_"] = fields.pop("schema")
    try:
        request = Request.model_validate(fields)
    except ValidationError as error:
        raise Bad(f"not a request: {error.errors(include_input=False)[0]['msg']}") from None
    if request.method == "tool":
        if not request.name or len(request.name) > NAME or request.prompts:
            raise Bad("a tool call without a name")
    elif not request.prompts or (len(request.prompts) != 1 and not request.batch):
        raise Bad("a call without a prompt")
    return request


def done_of(message: dict[str, Any], shown: int) -> dict[str, Any]:
    """The fields of a CellResult that the worker may fill. Raises Bad."""
    status, error, answer = message.get("status"), message.get("error"), message.get("answer")
    if status not in ("ok", "error", "timeout"):
        raise Bad("a result without a status")
    if not isinstance(answer, dict) or type(answer.get("ready")) is not bool:
        raise Bad("a result without an answer")
    room = shown + 200  # the banner
    return {
        "status": status,
        "stdout": cut(_text(message, "stdout"), room),
        "stderr": cut(_text(message, "stderr"), room),
        "stdout_chars": _count(message, "stdout_chars"),
        "stderr_chars": _count(message, "stderr_chars"),
        "error": _error(error) if status != "ok" else None,
        "answer": Answer(content=answer.get("content"), ready=answer["ready"]),
        "variables": _variables(message.get("variables")),
    }


def _error(error: Any) -> CellError:
    if not isinstance(error, dict):
        raise Bad("an error without a description")
    return CellError(
        type=cut(_text(error, "type"), NAME),
        message=cut(_text(error, "message"), MESSAGE),
        traceback=cut(_text(error, "traceback"), TRACEBACK),
    )


def _variables(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > VARIABLES:
        raise Bad("not a list of variables")
    if not all(isinstance(v, str) for v in value.values()):
        raise Bad("not a list of variables")
    found = {
        name: v if len(v) <= DESCRIPTION and _described.fullmatch(v) else "object"
        for k, v in value.items()
        if (name := k[:NAME]).isidentifier()
    }
    return found | ({"...": MORE_VARIABLES} if "..." in value else {})


def _text(message: dict[str, Any], key: str) -> str:
    value = message.get(key)
    if not isinstance(value, str):
        raise Bad(f"{key} is not text")
    return value


def _count(message: dict[str, Any], key: str) -> int:
    value = message.get(key)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise Bad(f"{key} is not a count")
    return value
