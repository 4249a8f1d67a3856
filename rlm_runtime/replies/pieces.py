"""JSON of any length, read and written in pieces.

The decoder and encoder of the standard library hold the interpreter for as long as a text takes:
three quarters of a second for 60 MB of escapes, on whatever thread they run. Here no single step
handles more than about PIECE characters, so a thread that reads or writes a long text lets the
event loop go on. Short texts do not come here: the standard library is ten times as fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, TypeAlias

from rlm_runtime.replies.reader import size_of

Json: TypeAlias = Any  # None, bool, int, float, str, and lists and dicts of them
Scan: TypeAlias = Callable[[str, int], tuple[Json, int]]

PIECE = 1 << 18  # characters: some 5 ms
VALUES = 500_000  # of one text
ITEMS = 1_000  # of a container, written in one step

_BLANK = re.compile(r"[ \t\n\r]*+")
_ESCAPE = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_STRING = re.compile(rf'[^"\\\x00-\x1f]*+(?:{_ESCAPE}[^"\\\x00-\x1f]*+)*+')
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")
_LOW = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_LONGEST = 12  # characters of an escape that may be cut at the end of a piece: a surrogate pair
_scan: Scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


def loads(text: str, scan: Scan = _scan, most: int = VALUES) -> Json:
    """As `json.loads`, but lone surrogates become "?". `scan` reads what is no string and no
    container.

    Raises ValueError (also for more than `most` values), RecursionError.
    """
    reader = _Reader(text, scan, most)
    value, end = reader.value(reader.after_blanks(0))
    if reader.after_blanks(end) != len(text):
        raise ValueError(f"extra data at character {end:,}")
    return value


class _Reader:
    def __init__(self, text: str, scan: Scan, most: int):
        self.text, self._scan, self._left = text, scan, most

    def after_blanks(self, at: int) -> int:
        found = _BLANK.match(self.text, at)
        assert found, "matches the empty string"
        return found.end()

    def value(self, at: int) -> tuple[Json, int]:
        """The value that begins at a character, and where it ends."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many values")
        kind = self.text[at : at + 1]
        if kind == '"':
            return _string(self.text, at + 1)
        if kind == "[":
            return self._list(at + 1)
        if kind == "{":
            return self._dict(at + 1)
        try:
            return self._scan(self.text, at)
        except StopIteration:
            raise _wrong(at) from None

    def _mark(self, at: int) -> tuple[str, int]:
        """The next character that is no blank, and where it stands."""
        at = self.after_blanks(at)
        return self.text[at : at + 1], at

    def _list(self, at: int) -> tuple[list[Json], int]:
        items: list[Json] = []
        mark, at = self._mark(at)
        if mark == "]":
            return items, at + 1
        while True:
            value, at = self.value(at)
            items.append(value)
            mark, at = self._mark(at)
            if mark == "]":
                return items, at + 1
            if mark != ",":
                raise _wrong(at)
            at = self.after_blanks(at + 1)

    def _dict(self, at: int) -> tuple[dict[str, Json], int]:
        items: dict[str, Json] = {}
        mark, at = self._mark(at)
        if mark == "}":
            return items, at + 1
        while True:
            if self.text[at : at + 1] != '"':
                raise _wrong(at)
            key, at = _string(self.text, at + 1)
            mark, at = self._mark(at)
            if mark != ":":
                raise _wrong(at)
            items[key], at = self.value(self.after_blanks(at + 1))
            mark, at = self._mark(at)
            if mark == "}":
                return items, at + 1
            if mark != ",":
                raise _wrong(at)
            at = self.after_blanks(at + 1)


def _wrong(at: int) -> ValueError:
    return ValueError(f"no value at character {at:,}")


def _string(text: str, at: int) -> tuple[str, int]:
    """The string that begins behind the quote before `at`, and where its closing quote ends."""
    parts: list[str] = []
    while True:
        found = _STRING.match(text, at, at + PIECE + _LONGEST)
        assert found, "matches the empty string"
        end = found.end()
        if _HIGH.search(text, max(at, end - 6), end) and _LOW.match(text, end):
            end += 6
        part = text[at:end]
        parts.append(valid(scanstring(part + '"', 0)[0]) if "\\" in part else valid(part))
        if text[end : end + 1] == '"':
            return "".join(parts) if len(parts) > 1 else parts[0], end + 1
        if end == at:
            raise ValueError(f"no string at character {at:,}")
        at = end


def valid(text: str) -> str:
    """The text with every lone surrogate turned into "?": it can be written as UTF-8."""
    if text.isascii():
        return text
    if all(_is_valid(text[at : at + PIECE]) for at in range(0, len(text), PIECE)):
        return text
    parts = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
    return "".join([part.encode("utf-8", "replace").decode("utf-8") for part in parts])


def _is_valid(part: str) -> bool:
    try:
        part.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Form:
    """How JSON is written: in ASCII or not, and what stands between items, and between a key and
    its value."""

    ascii: bool = True
    comma: str = ","
    colon: str = ":"

    def whole(self, value: Json) -> bytes:
        text = json.dumps(value, ensure_ascii=self.ascii, separators=(self.comma, self.colon))
        return text.encode("utf-8", "replace")

    def inside(self, items: Json) -> bytes:
        """A string without its quotes, a container without its brackets."""
        return self.whole(items)[1:-1]


COMPACT, WIDE = Form(), Form(ascii=False, comma=", ", colon=": ")


def dumps(value: Json, form: Form = COMPACT) -> bytes:
    """As `json.dumps` in UTF-8; lone surrogates become "?" where `form` is not ASCII. Raises
    TypeError, ValueError, RecursionError."""
    return b"".join(_written(value, form))


def _written(value: Json, form: Form) -> Iterator[bytes]:
    if not isinstance(value, str | dict | list | tuple) or size_of(value, PIECE + 1) <= PIECE:
        yield form.whole(value)
    elif isinstance(value, str):
        yield b'"'
        for at in range(0, len(value), PIECE):
            yield form.inside(value[at : at + PIECE])
        yield b'"'
    else:
        brackets, comma = b"{}" if isinstance(value, dict) else b"[]", b""
        yield brackets[:1]
        for some in _groups(value):
            yield comma
            yield from _some(some, form)
            comma = form.comma.encode()
        yield brackets[1:]


def _groups(value: Json) -> Iterator[Json]:
    if isinstance(value, dict):
        items = iter(value.items())
        while some := dict(islice(items, ITEMS)):
            yield some
    else:
        for at in range(0, len(value), ITEMS):
            yield value[at : at + ITEMS]


def _some(items: Json, form: Form) -> Iterator[bytes]:
    """Some items of a container, without its brackets."""
    if size_of(items, PIECE + 1) <= PIECE:
        yield form.inside(items)
        return
    comma = b""
    for item in items:
        yield comma
        if isinstance(items, dict):
            yield from (
                _written(item, form)
                if isinstance(item, str)
                else [form.inside({item: 0})[: -1 - len(form.colon)]]
            )
            yield form.colon.encode()
            yield from _written(items[item], form)
        else:
            yield from _written(item, form)
        comma = form.comma.encode()
