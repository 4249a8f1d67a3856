"""Regular expressions over a text that is not in memory, with the very results `re` would give on the whole string.

A pattern is run on windows. What makes that exact: from the pattern's parse tree we know an upper bound on how far a
match that starts at some character can look (*reach*) - single characters count one, a repeat of a character class
can go no further than the run of such characters that stands in the text. A match that starts in the first part of a
window is believed only where its reach lies inside the window. Patterns that can look without bound (`.*` with
DOTALL) get windows that grow, or the whole text where it is small enough; otherwise ValueError says what to write.

Standard library only: this file runs inside the confined worker.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from re import _compiler, _constants, _parser

WHOLE_LIMIT = 64 << 20  # characters a window may grow to
EDGE = 2  # `$` and `\b` look at up to two characters behind a match

LOCAL = re.ASCII | re.LOCALE | re.UNICODE
LEAVES = {_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN, _constants.RANGE}
REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT}
ANYTHING = [{_constants.CATEGORY_SPACE, _constants.CATEGORY_NOT_SPACE},
            {_constants.CATEGORY_WORD, _constants.CATEGORY_NOT_WORD},
            {_constants.CATEGORY_DIGIT, _constants.CATEGORY_NOT_DIGIT}]  # fmt: skip


class Unbounded(Exception):
    """The pattern has a part whose reach the analysis cannot bound."""


# -- how far a pattern can look


class Plan:
    """`ops`: what bounds the reach of a match, in order: ("skip", n), ("run", class regex, at most n or None),
    ("either", [ops, ...]). `behind`: characters a match looks back. None for `ops`: no bound."""

    def __init__(self, pattern: re.Pattern):
        self.pattern = pattern
        self.tree = _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
        self.flags = self.tree.state.flags
        self.groups: dict[int, object] = {}
        try:
            self.behind = 1 + self._behind(self.tree)
            self._collect(self.tree)
            self.ops = self._ops(self.tree, self.flags)
        except (Unbounded, RecursionError):
            self.ops, self.behind = None, 1
        self.lazy = self._lazy()

    def _collect(self, tree) -> None:
        for op, av in tree:
            if op is _constants.SUBPATTERN and av[0] is not None:
                self.groups[av[0]] = av[3]
            for sub in _children(op, av):
                self._collect(sub)

    def _behind(self, tree) -> int:
        most = 0
        for op, av in tree:
            if op in (_constants.ASSERT, _constants.ASSERT_NOT) and av[0] < 0:
                most = max(most, av[1].getwidth()[1])
            most = max([most, *(self._behind(sub) for sub in _children(op, av))])
        return most

    def _ops(self, tree, flags: int) -> list:
        out: list = []
        for op, av in tree:
            if op in LEAVES:
                out.append(("skip", 1))
            elif op is _constants.AT:
                continue
            elif op in (_constants.ASSERT, _constants.ASSERT_NOT):
                if av[0] > 0:
                    out += self._ops(av[1], flags)
                elif self._ahead(av[1]):
                    raise Unbounded
            elif op is _constants.SUBPATTERN:
                _, add, remove, sub = av
                if (add | remove) & LOCAL:
                    raise Unbounded
                out += self._ops(sub, (flags | add) & ~remove)
            elif op is _constants.ATOMIC_GROUP:
                out += self._ops(av, flags)
            elif op is _constants.BRANCH:
                out.append(("either", [self._ops(sub, flags) for sub in av[1]]))
            elif op is _constants.GROUPREF_EXISTS:
                out.append(("either", [self._ops(sub, flags) for sub in av[1:] if sub is not None]))
            elif op is _constants.GROUPREF:
                out.append(self._run([self.groups[av]], flags, None))
            elif op in REPEATS:
                _, most, sub = av
                width = sub.getwidth()[1] + self._ahead(sub)
                endless = most is _constants.MAXREPEAT or width >= _constants.MAXREPEAT
                if not endless and most * width <= 64:
                    out += self._ops(sub, flags) * most if most * width > 1 else [("skip", most * width)]
                else:
                    out.append(self._run([sub], flags, None if endless else most * width))
            elif op in (_constants.FAILURE, _constants.SUCCESS):
                continue
            else:
                raise Unbounded
        return _merged(out)

    def _ahead(self, tree) -> int:
        """Characters the look-aheads inside can look at, which the width of the match does not count."""
        total = 0
        for op, av in tree:
            if op in (_constants.ASSERT, _constants.ASSERT_NOT) and av[0] > 0:
                total += av[1].getwidth()[1]
            total += sum(self._ahead(sub) for sub in _children(op, av))
        return total

    def _run(self, trees: list, flags: int, most: int | None):
        """A repeat of anything goes no further than the run of characters one of its parts can match."""
        leaves: dict[str, tuple] = {}
        flags = self._leaves(trees, flags, leaves, set())
        if not leaves:
            return ("skip", 0)
        state = _parser.State()
        state.flags = flags & ~(re.DEBUG | re.VERBOSE)
        parts = [_parser.SubPattern(state, [leaf]) for leaf in leaves.values()]
        one = parts[0] if len(parts) == 1 else _parser.SubPattern(state, [(_constants.BRANCH, (None, parts))])
        many = [(_constants.MAX_REPEAT, (0, _constants.MAXREPEAT, one))]
        return ("run", _compiler.compile(_parser.SubPattern(state, many), state.flags), most)

    def _leaves(self, trees, flags: int, leaves: dict, seen: set) -> int:
        """Every single-character part, look-aheads included; returns the flags, the more generous where they differ."""
        for tree in trees:
            for op, av in tree:
                if op in LEAVES:
                    leaves[repr((op, av))] = (op, av)
                elif op is _constants.SUBPATTERN:
                    if (av[1] | av[2]) & LOCAL:
                        raise Unbounded
                    # a part with its own flags: the union of both readings, as IGNORECASE and DOTALL only add
                    if av[2] & re.IGNORECASE:
                        raise Unbounded
                    flags |= av[1] & (re.IGNORECASE | re.DOTALL)
                    flags = self._leaves([av[3]], flags, leaves, seen)
                elif op is _constants.GROUPREF:
                    if av not in seen:
                        seen.add(av)
                        flags = self._leaves([self.groups[av]], flags, leaves, seen)
                elif op in (_constants.AT, _constants.FAILURE, _constants.SUCCESS) or (
                    op in (_constants.ASSERT, _constants.ASSERT_NOT) and av[0] < 0 and not self._ahead(av[1])
                ):
                    continue
                else:
                    below = _children(op, av)
                    if not below:
                        raise Unbounded
                    flags = self._leaves(below, flags, leaves, seen)
        return flags

    # -- patterns like  <a ...>(.*?)</a>  with a dot that matches everything

    def _lazy(self) -> Lazy | None:
        """Set where the pattern is a row of bounded parts with lazy "anything" repeats between them, for which a
        match found in a window is the match of the whole text (see `Lazy`)."""
        items = self._flat(self.tree, None)
        if items is None:
            return None
        spots = [i for i, (item, _) in enumerate(items) if self._is_lazy_any(item)]
        if not spots:
            return None
        first, last = spots[0], spots[-1]
        try:
            for i, (item, _) in enumerate(items):
                if i in spots:
                    continue
                if _mentions(item, _constants.GROUPREF) or _mentions(item, _constants.GROUPREF_EXISTS):
                    return None
                width = self._part([item]).getwidth()
                if first < i < last and width[0] != width[1]:
                    return None
            head, tail = [item for item, _ in items[:first]], [item for item, _ in items[last + 1 :]]
            lead, final = self._part(head), self._part(tail)
            low, high = lead.getwidth()
            tail_low, tail_high = final.getwidth()
            group = items[first][1] if low != high else None  # the group that holds just the lazy part
            fixed_tail = tail_low if tail_low == tail_high and len(spots) == 1 else None
            if low != high and group is None and fixed_tail is None:
                return None
            within = sum(self._part([item]).getwidth()[1] for i, (item, _) in enumerate(items) if first < i < last
                         and i not in spots)  # fmt: skip
            between = self._ops(self._part([item for i, (item, _) in enumerate(items) if first < i < last
                                            and i not in spots]), self.flags)  # fmt: skip
            return Lazy(
                start=_compiler.compile(lead, self.flags & ~re.DEBUG) if head else None,
                head=self._ops(lead, self.flags),
                tail=between + self._ops(final, self.flags) + [("skip", within)],
                settled=low == high,
                least=items[first][0][1][0],
                group=group,
                fixed_tail=fixed_tail,
            )
        except (Unbounded, RecursionError):
            return None

    def _part(self, items: list):
        return _parser.SubPattern(self.tree.state, list(items))

    def _flat(self, tree, group: int | None) -> list | None:
        """The top-level parts, groups opened: [(item, its group where it is alone in one)]."""
        out = []
        for op, av in tree:
            if op is _constants.SUBPATTERN and _mentions((op, av), _constants.MIN_REPEAT):
                if av[1] or av[2]:
                    return None
                inner = self._flat(av[3], av[0] if len(av[3]) == 1 else None)
                if inner is None:
                    return None
                out += inner
            else:
                out.append(((op, av), group))
        return out

    def _is_lazy_any(self, item) -> bool:
        op, av = item
        if op is not _constants.MIN_REPEAT or av[1] is not _constants.MAXREPEAT or len(av[2]) != 1:
            return False
        leaf, value = av[2][0]
        if leaf is _constants.SUBPATTERN and value[0] is None and not value[1] | value[2] and len(value[3]) == 1:
            leaf, value = value[3][0]
        if leaf is _constants.ANY:
            return bool(self.flags & re.DOTALL)
        if leaf is not _constants.IN or value[0][0] is _constants.NEGATE:
            return False
        categories = {v for kind, v in value if kind is _constants.CATEGORY}
        return any(both <= categories for both in ANYTHING)


class Lazy:
    """head .*? tail. A match found inside a window is final where (a) the text its tail can look at lies inside, and
    (b) the tail begins beyond what any other way of matching the head could reach: every earlier candidate of the
    search order would have found that same tail, so it failed for good and not for want of text."""

    def __init__(self, start, head, tail, settled, least, group, fixed_tail):
        self.start, self.head, self.tail = start, head, tail
        self.settled, self.least, self.group, self.fixed_tail = settled, least, group, fixed_tail

    def tail_begin(self, match: re.Match) -> int:
        return match.end(self.group) if self.group is not None else match.end() - self.fixed_tail


def _children(op, av) -> list:
    if op is _constants.SUBPATTERN:
        return [av[3]]
    if op in REPEATS:
        return [av[2]]
    if op is _constants.BRANCH:
        return list(av[1])
    if op in (_constants.ASSERT, _constants.ASSERT_NOT):
        return [av[1]]
    if op is _constants.ATOMIC_GROUP:
        return [av]
    if op is _constants.GROUPREF_EXISTS:
        return [sub for sub in av[1:] if sub is not None]
    return []


def _mentions(item, wanted) -> bool:
    op, av = item
    return op is wanted or any(_mentions(below, wanted) for sub in _children(op, av) for below in sub)


def _merged(ops: list) -> list:
    out: list = []
    for op in ops:
        if op[0] == "skip" and out and out[-1][0] == "skip":
            out[-1] = ("skip", out[-1][1] + op[1])
        elif op != ("skip", 0):
            out.append(op)
    return out


@functools.lru_cache(512)
def _plan(pattern: re.Pattern) -> Plan:
    return Plan(pattern)


def furthest(text, ops: list, position: int, limit: int) -> int:
    """An upper bound of how far a match from `position` looks; anything past `limit` is just "past"."""
    for op in ops:
        if position > limit:
            return position
        if op[0] == "skip":
            position += op[1]
        elif op[0] == "run":
            end = _run_end(text, op[1], position, limit if op[2] is None else min(limit, position + op[2]))
            position = end if op[2] is None else min(end, position + op[2])
        else:
            position = max([position, *(furthest(text, way, position, limit) for way in op[1])])
    return position


def _run_end(text, run: re.Pattern, position: int, limit: int) -> int:
    size = 256
    while position <= limit:
        piece = text._read(position, position + size)
        end = run.match(piece).end()
        position += end
        if end < size:
            return position
        size = min(size * 4, 1 << 20)
    return position


# -- matching


class Match:
    """A match with positions in the whole text; otherwise as `re.Match`."""

    __slots__ = ("_match", "_shift", "endpos", "pos", "string")

    def __init__(self, match: re.Match, shift: int, text, pos: int):
        self._match, self._shift, self.string, self.pos = match, shift, text, pos

    def __getattr__(self, name: str):
        if name == "endpos":
            return len(self.string)
        return getattr(self._match, name)  # group, groups, groupdict, expand, lastindex, lastgroup, re

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
    plan = _plan(pattern)
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
    """(where the window begins, its characters, matches that start before here are final, no text follows, the step
    of the next window); None where the reach is too long for a window."""
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
        if stop < pos + size or not text._read(stop, stop + 1):  # the rest of the text: nothing can change any more
            for match in pattern.finditer(chars, pos - begin):
                yield Match(match, begin, text, origin)
            return
        match = pattern.search(chars, pos - begin)
        if match is not None and _final(text, lazy, match, begin, stop):
            yield Match(match, begin, text, origin)
            at, pos = match.start() + begin, match.end() + begin
            if at == pos:  # an empty match: go on as `re` does, by way of a window that knows the last one
                raise too_long(pattern, text)
            size = 4 * text._step()
            continue
        # nothing certain: keep the first place where the head matches, or could with more text, and read on
        sure = _sure_start(text, lazy, pos, stop)
        found = lazy.start.search(chars, pos - begin) if lazy.start is not None else None
        first = pos if lazy.start is None else (found.start() + begin if found is not None else sure)
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
    return reached + EDGE <= stop and (lazy.settled or lazy.tail_begin(match) + begin >= reached + lazy.least)


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
    plan = _plan(pattern)
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
    """A compiled pattern whose methods take a Text as well. Everything else is the real pattern's."""

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
OVER_TEXT = {"search": _search, "match": match, "fullmatch": fullmatch, "finditer": finditer, "findall": _findall}
for _name, _function in OVER_TEXT.items():
    setattr(Pattern, _name, _method(_name, _function))
Pattern.split = lambda self, string, maxsplit=0: self._pattern.split(_plain(string), maxsplit)
Pattern.sub = lambda self, repl, string, count=0: self._pattern.sub(repl, _plain(string), count)
Pattern.subn = lambda self, repl, string, count=0: self._pattern.subn(repl, _plain(string), count)


def _plain(string):
    return str(string) if type(string) is _text_type else string


def install(text_type: type) -> None:
    """Teach the functions of `re` the Text; plain strings go the way they always went. Done once, in the worker."""
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
    if sys._getframe(1).f_globals.get("__spec__") is None and isinstance(real.pattern, str):  # a cell, not a module
        return Pattern(real)
    return real
