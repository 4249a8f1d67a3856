"""JSON that a model wrote: the one reader of it. Bounded work, whatever the text.

Models put JSON alone, in a fence or among words; break lines inside strings; leave a comma before a
bracket; write typographic quotes, or a dict as Python prints it. All of that is read. `NaN` and the
like are not: no schema knows them.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections import deque
from typing import Any, NoReturn, TypeAlias

Json: TypeAlias = Any  # None, bool, int, float, str, and lists and dicts of them

# commas and opening brackets of one text: more take the decoder longer than a caller may wait
VALUES = 250_000
TRIED = 64  # places in a reply where JSON may begin that are tried
# characters of a Python literal; its syntax tree costs a hundred times what JSON does
LITERAL = 10_000
_QUOTES = str.maketrans({"“": '"', "”": '"'})
_TRAILING_COMMA = re.compile(r",(?=\s*+[}\]])")
_FENCE = re.compile(r"^[ \t]*+(`{3,16}|~{3,16})[ \t]*+(?:json|jsonc|json5)?[ \t]*+\n", re.M | re.I)
_START = re.compile(r"[{\[]")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_no_constant)


class Effort:
    """Characters that may still be read for one reply. Attempts that fail late would else be
    quadratic together."""

    def __init__(self, left: int):
        self.left = left

    @classmethod
    def for_json(cls, chars: int) -> Effort:
        return cls(8 * chars + 4_000)

    def spend(self, chars: int) -> bool:
        self.left -= chars
        return self.left >= 0


def loads(text: str, effort: Effort | None = None) -> tuple[Json] | None:
    """The value of a text that is JSON as a whole, in a tuple of one (it may be null); None where
    it is none."""
    text = text.strip()
    effort = effort or Effort.for_json(len(text))
    if (found := _whole(text, effort)) is not None:
        return found
    if text[:1] not in ("{", "["):
        return None
    repaired = _TRAILING_COMMA.sub("", text.translate(_QUOTES))
    if repaired != text and (found := _whole(repaired, effort)) is not None:
        return found
    return _python_literal(text, effort)


def raw_decode(text: str, start: int, effort: Effort) -> tuple[Json, int] | None:
    """The value that begins at `start` and where it ends, whatever follows it; None where there is
    none."""
    if effort.left <= 0 or not _few(text, start):
        return None
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as e:  # of an unclosed string it names the beginning
        far = len(text) if e.msg.startswith("Unterminated") else e.pos
        effort.spend(max(far - start, 1))
        return None
    # a constant, an integer of too many digits, too many brackets
    except (ValueError, RecursionError):
        effort.spend(len(text) - start)
        return None
    effort.spend(end - start)
    return value, end


def in_reply(text: str, effort: Effort | None = None) -> tuple[Json] | None:
    """The JSON value in a reply without its thinking, in a tuple of one; None where there is none.

    Tried in turn: the whole reply, the last fence that holds JSON, the largest object or array
    among the words.
    """
    text = text.strip()
    effort = effort or Effort.for_json(len(text))
    if (whole := loads(text, effort)) is not None:
        return whole
    for opening in reversed(deque(_FENCE.finditer(text), TRIED)):
        if effort.left <= 0:
            return None
        end = text.find(opening[1], opening.end())
        end = end if end >= 0 else len(text)
        effort.spend(end - opening.end())
        if (inside := loads(text[opening.end() : end], effort)) is not None:
            return inside
    return _largest(text, effort)


def _largest(text: str, effort: Effort) -> tuple[Json] | None:
    """The longest object or array that begins somewhere in the text; of equally long ones, the
    last."""
    best: tuple[int, Json] | None = None
    at, failures = 0, 0
    while failures < TRIED and effort.left > 0 and (start := _START.search(text, at)):
        found = raw_decode(text, start.start(), effort)
        if found is None:
            at, failures = start.end(), failures + 1
            continue
        value, at = found
        if best is None or at - start.start() >= best[0]:
            best = (at - start.start(), value)
    return None if best is None else (best[1],)


def _whole(text: str, effort: Effort) -> tuple[Json] | None:
    found = raw_decode(text, 0, effort) if text else None
    return (found[0],) if found is not None and found[1] == len(text) else None


def _few(text: str, start: int) -> bool:
    """Whether the decoder makes at most VALUES values of it. Marks inside strings count, too: an
    upper bound."""
    if len(text) - start <= VALUES:
        return True
    return text.count(",", start) + text.count("[", start) + text.count("{", start) <= VALUES


def _python_literal(text: str, effort: Effort) -> tuple[Json] | None:
    """{'a': True, 'b': None}: a dict or list as Python prints it."""
    if len(text) > LITERAL or not effort.spend(len(text)):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a string of the model's
            value = ast.literal_eval(text)
        return (json.loads(json.dumps(value, allow_nan=False)),)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
