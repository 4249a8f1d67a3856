"""Regular expressions over a text that is not in memory, with the very results `re` would give on
the whole string.

A pattern is run on windows. What makes that exact: we know an upper bound on how far a match that
starts at some character can look (its reach, `textreach.py`). A match that starts in the first part
of a window is believed only where its reach lies inside the window. Patterns that can look without
bound (`.*` with DOTALL) get windows that grow, or the whole text where it is small enough;
otherwise ValueError says what to write.

Standard library only: this file runs inside the confined worker.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator

try:  # as part of the package, or beside this file when the worker is started by path
    from .textreach import Lazy, Plan, furthest, plan_of
except ImportError:
    from textreach import Lazy, Plan, furthest, plan_of

WHOLE_LIMIT = 64 << 20  # characters a window may grow to
EDGE = 2  # `$` and `\b` look at up to two characters behind a match


class Match:
    """A match with positions in the whole text; otherwise as `re.Match`."""

    __slots__ = ("_match", "_shift", "endpos", "pos", "string")

    def __init__(self, match: re.Match, shift: int, text, pos: int):
        self._match, self._shift, self.string, self.pos = match, shift, text, pos

    def __getattr__(self, name: str):
        if name == "endpos":
            return len(self.string)
        # group, groups, groupdict, expand, lastindex, lastgroup, re
        return getattr(self._match, name)

    def start(self, group=0) -> int:
        at = self._match.start(group)
        return at if at < 0 else at + self._shift

    def end(self, group=0) -> int:
        at = self._match.end(group)
        return at if at < 0 else at + self._shift

    def span(self, group=0) -> tuple[int, int]:
        return self.start(group), self.end(group)

    @property
    def regs(self) -> tuple:
        return tuple(self.span(i) for i in range(len(self._match.regs)))

    def __getitem__(self, group):
        return self._match[group]

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"<Match span={self.span()}, match={self.group()[:50]!r}>"


def compiled(pattern, flags: int = 0) -> re.Pattern:
    """The real pattern of a str, a compiled pattern or our stand-in for one."""
    if isinstance(pattern, Pattern):
        pattern = pattern._pattern
    pattern = real_compile(pattern, flags)
    if isinstance(pattern.pattern, bytes):
        raise TypeError("cannot use a bytes pattern on a text")
    return pattern


real_compile = re.compile


def finditer(text, pattern, pos: int = 0, flags: int = 0) -> Iterator[Match]:
    pattern = compiled(pattern, flags)
    return _finditer(text, pattern, max(0, pos))


def _finditer(text, pattern: re.Pattern, origin: int) -> Iterator[Match]:
    plan = plan_of(pattern)
    pos, step = origin, text._step()
    if pos > 0 and not text._read(pos - 1, pos):
        pos = len(text)  # as `re` does with a start beyond the end
    while True:
        window = _window(text, plan, pos, step)
        if window is None:
            yield from _lazy_finditer(text, pattern, plan, pos, origin)
            return
        begin, chars, own_end, last, step = window
        for match in pattern.finditer(chars, pos - begin):
            if match.start() + begin >= own_end:
                break
            pos = match.end() + begin
            yield Match(match, begin, text, origin)
        if last:
            return
        pos = max(pos, own_end)


def _window(text, plan: Plan, pos: int, step: int):
    """(where the window begins, its characters, matches that start before here are final, no text
    follows, the step of the next window); None where the reach is too long for a window."""
    begin = max(0, pos - plan.behind)
    own_end = pos + step
    if plan.ops is None or not text._read(own_end, own_end + 1):
        size = WHOLE_LIMIT if plan.ops is None else step
        chars = text._read(begin, pos + size + 1)
        if len(chars) <= pos - begin + size:
            return begin, chars, pos + size + 2, True, step
        if plan.ops is None:
            return None
    limit = own_end + WHOLE_LIMIT
    end = furthest(text, plan.ops, own_end, limit) + EDGE
    if end > limit and text._read(limit, limit + 1):
        return None
    chars = text._read(begin, end)
    if begin + len(chars) < end or not text._read(end, end + 1):
        return begin, chars, end + 1, True, step
    return begin, chars, own_end, False, max(text._step(), min(end - own_end, WHOLE_LIMIT // 4))


def _lazy_finditer(text, pattern: re.Pattern, plan: Plan, pos: int, origin: int) -> Iterator[Match]:
    lazy = plan.lazy
    if lazy is None:
        raise too_long(pattern, text)
    size = 4 * text._step()
    while True:
        begin = max(0, pos - plan.behind)
        chars = text._read(begin, pos + size)
        stop = begin + len(chars)
        # the rest of the text: nothing can change any more
        if stop < pos + size or not text._read(stop, stop + 1):
            for match in pattern.finditer(chars, pos - begin):
                yield Match(match, begin, text, origin)
            return
        match = pattern.search(chars, pos - begin)
        if match is not None and _final(text, lazy, match, begin, stop):
            yield Match(match, begin, text, origin)
            at, pos = match.start() + begin, match.end() + begin
            # an empty match: go on as `re` does, by way of a window that knows the last one
            if at == pos:
                raise too_long(pattern, text)
            size = 4 * text._step()
            continue
        # nothing certain: keep the first place where the head matches, or could with more text, and
        # read on
        sure = _sure_start(text, lazy, pos, stop)
        found = lazy.start.search(chars, pos - begin) if lazy.start is not None else None
        first = (
            pos if lazy.start is None else (found.start() + begin if found is not None else sure)
        )
        ahead = min(first, sure)
        if ahead > pos:
            pos = ahead
            if found is None:
                size = 4 * text._step()
                continue
        size *= 2
        if size > 2 * WHOLE_LIMIT:
            raise too_long(pattern, text, pos)


def _final(text, lazy: Lazy, match: re.Match, begin: int, stop: int) -> bool:
    if furthest(text, lazy.tail, match.end() + begin, stop) + EDGE > stop:
        return False
    reached = furthest(text, lazy.head, match.start() + begin, stop)
    return reached + EDGE <= stop and (
        lazy.settled or lazy.tail_begin(match) + begin >= reached + lazy.least
    )


def _sure_start(text, lazy: Lazy, pos: int, stop: int) -> int:
    """Starts before here have everything their head can look at inside the window."""
    back = 64
    while stop - back > pos:
        if furthest(text, lazy.head, stop - back, stop) + EDGE <= stop:
            return stop - back
        back *= 4
    return pos


def too_long(pattern: re.Pattern, text, at: int | None = None) -> ValueError:
    where = "" if at is None else f" (from character {at:,})"
    return ValueError(
        f"the pattern {pattern.pattern!r} can match over more than {WHOLE_LIMIT:,} characters{where}, more than is held "
        "in memory of this text. Bound its repeats ({0,10000} instead of *), leave out re.DOTALL, or search pieces: "
        "for piece in text.chunks(1_000_000, 1_000) or for line in text.lines()."
    )


def match(text, pattern, pos: int = 0, flags: int = 0) -> Match | None:
    return _anchored(text, compiled(pattern, flags), max(0, pos), "match")


def fullmatch(text, pattern, pos: int = 0, flags: int = 0) -> Match | None:
    return _anchored(text, compiled(pattern, flags), max(0, pos), "fullmatch")


def _anchored(text, pattern: re.Pattern, pos: int, method: str) -> Match | None:
    plan = plan_of(pattern)
    if pos > 0 and not text._read(pos - 1, pos):
        pos = len(text)
    begin = max(0, pos - plan.behind)
    end = pos + WHOLE_LIMIT
    if plan.ops is not None:
        end = min(end, furthest(text, plan.ops, pos, end) + EDGE)
    chars = text._read(begin, end)
    if end == pos + WHOLE_LIMIT and text._read(end, end + 1):
        lazy = plan.lazy
        if method == "match" and lazy is not None:
            first = next(_lazy_finditer(text, pattern, plan, pos, pos), None)
            return first if first is not None and first.start() == pos else None
        raise too_long(pattern, text)
    if method == "fullmatch" and text._read(end, end + 1):
        return None  # more text than the pattern could ever take in
    found = getattr(pattern, method)(chars, pos - begin)
    return None if found is None else Match(found, begin, text, pos)


def found(match: Match):
    """What `findall` lists for a match."""
    groups = match.groups("")
    return match.group() if not groups else groups[0] if len(groups) == 1 else groups


# -- `re` itself, for code that calls it with a Text


class Pattern:
    """A compiled pattern whose methods take a Text as well. Everything else is the real
    pattern's."""

    __slots__ = ("_pattern",)

    def __init__(self, pattern: re.Pattern):
        self._pattern = pattern

    __class__ = property(lambda self: re.Pattern)  # isinstance(p, re.Pattern) stays true

    def __getattr__(self, name: str):
        return getattr(self._pattern, name)

    def __eq__(self, other):
        return self._pattern == getattr(other, "_pattern", other)

    def __hash__(self):
        return hash(self._pattern)

    def __repr__(self):
        return repr(self._pattern)

    def __reduce__(self):
        return re.compile, (self._pattern.pattern, self._pattern.flags)


def _limited(string, endpos: int):
    return string if endpos == sys.maxsize else string._upto(endpos)


def _method(name: str, over_text):
    real = getattr(re.Pattern, name)

    def method(self, string, pos=0, endpos=sys.maxsize):
        if type(string) is _text_type:
            return over_text(_limited(string, endpos), self._pattern, pos)
        return real(self._pattern, string, pos, endpos)

    method.__name__ = name
    return method


def _findall(text, pattern, pos=0, flags=0):
    return [found(m) for m in finditer(text, pattern, pos, flags)]


def _search(text, pattern, pos=0, flags=0):
    return next(finditer(text, pattern, pos, flags), None)


_text_type: type | None = None
OVER_TEXT = {
    "search": _search,
    "match": match,
    "fullmatch": fullmatch,
    "finditer": finditer,
    "findall": _findall,
}
for _name, _function in OVER_TEXT.items():
    setattr(Pattern, _name, _method(_name, _function))
Pattern.split = lambda self, string, maxsplit=0: self._pattern.split(_plain(string), maxsplit)
Pattern.sub = lambda self, repl, string, count=0: self._pattern.sub(repl, _plain(string), count)
Pattern.subn = lambda self, repl, string, count=0: self._pattern.subn(repl, _plain(string), count)


def _plain(string):
    return str(string) if type(string) is _text_type else string


def install(text_type: type) -> None:
    """Teach the functions of `re` the Text; plain strings go the way they always went. Done once,
    in the worker."""
    global _text_type
    if _text_type is not None:
        _text_type = text_type
        return
    _text_type = text_type
    for name, over_text in OVER_TEXT.items():
        setattr(re, name, _function_of(getattr(re, name), over_text))
    for name in ("split", "sub", "subn"):
        setattr(re, name, _plain_first(getattr(re, name), 1 if name == "split" else 2))
    re.compile = _compile


def _function_of(real, over_text):
    @functools.wraps(real)
    def function(pattern, string, flags=0):
        if type(string) is _text_type:
            return over_text(string, pattern, 0, flags)
        return real(pattern, string, flags)

    return function


def _plain_first(real, place: int):
    @functools.wraps(real)
    def function(*args, **kwargs):
        if len(args) > place and type(args[place]) is _text_type:
            args = (*args[:place], str(args[place]), *args[place + 1 :])
        elif type(kwargs.get("string")) is _text_type:
            kwargs["string"] = str(kwargs["string"])
        return real(*args, **kwargs)

    return function


@functools.wraps(real_compile)
def _compile(pattern, flags=0):
    real = real_compile(pattern._pattern if type(pattern) is Pattern else pattern, flags)
    # a cell, not a module
    if sys._getframe(1).f_globals.get("__spec__") is None and isinstance(real.pattern, str):
        return Pattern(real)
    return real
