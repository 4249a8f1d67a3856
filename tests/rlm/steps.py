"""Counting the work of a reader of text, so that a test can hold it to a bound without a clock.

`Pattern` is a plain backtracking matcher for the regular expressions of `re`: slow, and it counts
every step, those that are undone, too. `counting(*modules)` puts it in the place of the modules'
own patterns and counts what else walks over text: syntax trees, JSON, slices and searches of the
text itself.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sys
from re import _constants as sre
from re import _parser

from rlm_runtime.errors import UsageError

sys.setrecursionlimit(max(sys.getrecursionlimit(), 50_000))
INSIDE = {
    "category_digit": str.isdecimal,
    "category_space": str.isspace,
    "category_word": lambda c: c.isalnum() or c == "_",
}


class Work:
    """The steps counted so far."""

    steps = 0


def tick(steps=1):
    Work.steps += steps


# -- regular expressions ---------------------------------------------------------------------------
class Match:
    def __init__(self, pattern, string, groups):
        self.re, self.string, self._groups = pattern, string, groups

    def _index(self, group):
        return self.re.groupindex.get(group, group)

    def span(self, group=0):
        return self._groups.get(self._index(group), (-1, -1))

    def start(self, group=0):
        return self.span(group)[0]

    def end(self, group=0):
        return self.span(group)[1]

    def __getitem__(self, group):
        if isinstance(group, str) and group not in self.re.groupindex:
            raise IndexError("no such group")
        start, end = self.span(group)
        return None if start < 0 else self.string[start:end]

    def group(self, *groups):
        return self[groups[0] if groups else 0]

    def groups(self):
        return tuple(self[i] for i in range(1, self.re.groups + 1))

    def expand(self, template):
        return re.sub(
            r"\\(\d)|\\g<(\w+)>", lambda m: self[int(m[1]) if m[1] else m[2]] or "", template
        )


class Pattern:
    def __init__(self, pattern, flags=0):
        real = re.compile(pattern, flags)
        self.pattern, self.flags, self.groups, self.groupindex = (
            pattern,
            real.flags,
            real.groups,
            real.groupindex,
        )
        self._match = _sequence(list(_parser.parse(pattern, flags)), real.flags)

    def _at(self, text, pos, end, whole=False):
        groups = {}
        found = self._match(
            text, pos, end, groups, lambda at: at if not whole or at == end else None
        )
        if found is None:
            return None
        groups[0] = (pos, found)
        return Match(self, text, groups)

    def match(self, text, pos=0, end=None):
        return self._at(text, pos, len(text) if end is None else min(end, len(text)))

    def fullmatch(self, text, pos=0, end=None):
        return self._at(text, pos, len(text) if end is None else min(end, len(text)), whole=True)

    def search(self, text, pos=0, end=None):
        end = len(text) if end is None else min(end, len(text))
        for start in range(max(pos, 0), end + 1):
            tick()
            if found := self._at(text, start, end):
                return found
        return None

    def finditer(self, text, pos=0, end=None):
        end = len(text) if end is None else min(end, len(text))
        while pos <= end and (found := self.search(text, pos, end)) is not None:
            yield found
            pos = found.end() + (found.end() == found.start())

    def findall(self, text, pos=0, end=None):
        found = list(self.finditer(text, pos, end))
        return [
            m[0] if not self.groups else m[1] if self.groups == 1 else m.groups() for m in found
        ]

    def sub(self, new, text, count=0):
        parts, at = [], 0
        for i, m in enumerate(self.finditer(text)):
            if count and i >= count:
                break
            parts += [text[at : m.start()], new(m) if callable(new) else m.expand(new)]
            at = m.end()
        return "".join([*parts, text[at:]]) if parts else text

    def split(self, text, maxsplit=0):
        parts, at = [], 0
        for i, m in enumerate(self.finditer(text)):
            if maxsplit and i >= maxsplit:
                break
            parts.append(text[at : m.start()])
            at = m.end()
        return [*parts, text[at:]]


def _sequence(items, flags):
    nodes = [_node(op, value, flags) for op, value in items]

    def match(text, pos, end, groups, go, i=0):
        if i == len(nodes):
            return go(pos)
        return nodes[i](text, pos, end, groups, lambda at: match(text, at, end, groups, go, i + 1))

    return match


def _node(op, value, flags):
    name = str(op).lower()
    if name in ("literal", "not_literal", "any", "in"):
        one = _one(name, value, flags)

        def single(text, pos, end, groups, go):
            tick()
            return go(pos + 1) if pos < end and one(text, pos) else None

        single.one = one
        return single
    if name == "branch":
        options = [_sequence(list(option), flags) for option in value[1]]

        def branch(text, pos, end, groups, go):
            for option in options:
                tick()
                kept = dict(groups)
                if (found := option(text, pos, end, groups, go)) is not None:
                    return found
                groups.clear()
                groups.update(kept)
            return None

        return branch
    if name == "subpattern":
        number, add, remove, inner = value
        inside = _sequence(list(inner), (flags | add) & ~remove)

        def group(text, pos, end, groups, go):
            def closed(at):
                before = groups.get(number)
                if number is not None:
                    groups[number] = (pos, at)
                found = go(at)
                if found is None and number is not None:
                    groups.pop(number) if before is None else groups.update({number: before})
                return found

            return inside(text, pos, end, groups, closed)

        return group
    if name in ("max_repeat", "min_repeat", "possessive_repeat"):
        return _repeat(name, *value, flags)
    if name == "atomic_group":
        inside = _sequence(list(value), flags)

        def atomic(text, pos, end, groups, go):
            at = inside(text, pos, end, groups, lambda at: at)
            return None if at is None else go(at)

        return atomic
    if name in ("assert", "assert_not"):
        direction, inner = value
        inside, width = _sequence(list(inner), flags), inner.getwidth()[0]

        def looked(text, pos, end, groups, go):
            tick()
            start = pos if direction > 0 else pos - width
            kept = dict(groups)
            # look-behind sees what stands before the searched stretch, look-ahead ends with it
            holds = (
                start >= 0
                and inside(text, start, end if direction > 0 else pos, groups, lambda at: at)
                is not None
            )
            if name == "assert_not" or not holds:
                groups.clear()
                groups.update(kept)
            return go(pos) if holds == (name == "assert") else None

        return looked
    if name == "groupref":

        def again(text, pos, end, groups, go):
            start, stop = groups.get(value, (-1, -1))
            said = text[start:stop]
            tick(1 + len(said))
            if start < 0 or text[pos : pos + len(said)] != said or pos + len(said) > end:
                return None
            return go(pos + len(said))

        return again
    assert name == "at", name
    return _place(str(value).lower(), flags)


def _place(where, flags):
    many = bool(flags & re.M)
    word = INSIDE["category_word"]

    def holds(text, pos, end):
        if where == "at_beginning_string" or (where == "at_beginning" and not many):
            return pos == 0
        if where == "at_beginning":
            return pos == 0 or text[pos - 1] == "\n"
        if where == "at_end_string":
            return pos == end
        if where == "at_end":
            return pos == end or (text[pos] == "\n" and (many or pos == end - 1))
        before = pos > 0 and word(text[pos - 1])
        after = pos < end and word(text[pos])
        return (before != after) == (where == "at_boundary")

    def place(text, pos, end, groups, go):
        tick()
        return go(pos) if holds(text, pos, end) else None

    return place


def _one(name, value, flags):
    fold = bool(flags & re.I)

    def same(c, code):
        return c == chr(code) or (fold and c.lower() == chr(code).lower())

    if name == "any":
        return (lambda text, pos: True) if flags & re.S else (lambda text, pos: text[pos] != "\n")
    if name == "literal":
        return lambda text, pos: same(text[pos], value)
    if name == "not_literal":
        return lambda text, pos: not same(text[pos], value)
    negated = str(value[0][0]).lower() == "negate"
    tests = []
    for op, what in value[1:] if negated else value:
        kind = str(op).lower()
        if kind == "literal":
            tests.append(lambda c, what=what: same(c, what))
        elif kind == "range":
            tests.append(
                lambda c, what=what: any(
                    what[0] <= ord(x) <= what[1]
                    for x in ({c, c.lower(), c.upper()} if fold else {c})
                    if len(x) == 1
                )
            )
        else:
            category = str(what).lower()
            inside = INSIDE[category.replace("_not_", "_")]
            tests.append(lambda c, inside=inside, no="_not_" in category: bool(inside(c)) != no)
    return lambda text, pos: any(test(text[pos]) for test in tests) != negated


def _repeat(name, least, most, inner, flags):
    most = sys.maxsize if most is sre.MAXREPEAT else most
    inside = _sequence(list(inner), flags)
    node = _node(*inner[0], flags) if len(inner) == 1 else None
    one = getattr(node, "one", None)

    def simple(text, pos, end, groups, go):
        """Of single characters: without recursion."""
        far = pos
        if name == "min_repeat":
            while True:
                tick()
                if far - pos >= least and (found := go(far)) is not None:
                    return found
                if far >= end or far - pos >= most or not one(text, far):
                    return None
                far += 1
        while far < end and far - pos < most and one(text, far):
            tick()
            far += 1
        tick()
        if name == "possessive_repeat":
            return go(far) if far - pos >= least else None
        while far - pos >= least:
            tick()
            if (found := go(far)) is not None:
                return found
            far -= 1
        return None

    def possessive(text, pos, end, groups, go):
        times, at = 0, pos
        while times < most:
            tick()
            further = inside(text, at, end, groups, lambda x: x)
            if further is None or (further == at and times >= least):
                break
            at, times = further, times + 1
        return go(at) if times >= least else None

    def general(text, pos, end, groups, go, times=0, before=-1):
        tick()
        if times >= least and pos == before:
            return go(pos)
        lazy = name == "min_repeat"
        if lazy and times >= least and (found := go(pos)) is not None:
            return found
        if times < most:
            kept = dict(groups)
            found = inside(
                text,
                pos,
                end,
                groups,
                lambda at: general(text, at, end, groups, go, times + 1, pos),
            )
            if found is not None:
                return found
            groups.clear()
            groups.update(kept)
        return go(pos) if times >= least and not lazy else None

    return simple if one is not None else possessive if name == "possessive_repeat" else general


# -- the rest --------------------------------------------------------------------------------------
class Text(str):
    """A text that counts who walks over it. One step for eight characters: the machine is fast at
    these."""

    def __getitem__(self, index):
        found = str.__getitem__(self, index)
        if not isinstance(index, slice):
            return found
        tick(1 + len(found) // 8)
        return Text(found)

    def __hash__(self):
        tick(1 + len(self) // 8)
        return str.__hash__(self)

    def __eq__(self, other):
        return str.__eq__(self, other)


def _walks(name):
    plain = getattr(str, name)

    def method(self, *args, **kwargs):
        window = (
            [a for a in args[1:] if isinstance(a, int)]
            if name in ("find", "rfind", "count")
            else []
        )
        start, stop = (*window, len(self))[:2] if window else (0, len(self))
        tick(1 + max(stop - start, 0) // 8)
        found = plain(self, *args, **kwargs)
        return (
            Text(found)
            if type(found) is str
            else [Text(x) for x in found]
            if type(found) is list
            else found
        )

    return method


for _name in (
    "find",
    "rfind",
    "count",
    "strip",
    "rstrip",
    "lstrip",
    "translate",
    "split",
    "partition",
    "replace",
    "lower",
    "encode",
    "splitlines",
    "removesuffix",
    "removeprefix",
    "isascii",
):
    setattr(Text, _name, _walks(_name))


class _Re:
    """`re` as a module sees it."""

    def __getattr__(self, name):
        return getattr(re, name)

    def compile(self, pattern, flags=0):
        return pattern if isinstance(pattern, Pattern) else Pattern(pattern, flags)

    def __init__(self):
        for name in ("search", "match", "fullmatch", "split", "findall", "finditer"):
            setattr(
                self,
                name,
                lambda p, *a, _n=name, flags=0, **k: getattr(self.compile(p, flags), _n)(*a, **k),
            )
        self.sub = lambda p, new, text, count=0, flags=0: self.compile(p, flags).sub(
            new, text, count
        )


_compiled: dict = {}


def _counted(value):
    if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
        key = value.pattern, value.flags
        if key not in _compiled:
            _compiled[key] = Pattern(value.pattern, value.flags & ~re.U)
        return _compiled[key]
    if type(value) is dict and value and all(isinstance(v, re.Pattern) for v in value.values()):
        return {k: _counted(v) for k, v in value.items()}
    return value


@contextlib.contextmanager
def counting(*modules):
    """Counts the steps of code in `modules`; yields a function that gives those since it was called
    last."""
    saved = []

    def put(module, name, new):
        saved.append((module, name, getattr(module, name)))
        setattr(module, name, new)

    shim = _Re()
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is re:
                put(module, name, shim)
            elif (new := _counted(value)) is not value:
                put(module, name, new)
            elif (
                hasattr(value, "cache_clear")
                and getattr(value, "__module__", "") == module.__name__
            ):
                value.cache_clear()
    parse, decode = ast.parse, json.JSONDecoder.raw_decode

    def counted_parse(source, *args, **kwargs):
        tick(1 + 4 * len(source))
        return parse(str(source), *args, **kwargs)

    def counted_decode(self, text, start=0):
        try:
            value, end = decode(self, str(text), start)
        except json.JSONDecodeError as e:
            tick(1 + (len(text) if e.msg.startswith("Unterminated") else e.pos) - start)
            raise
        except Exception:
            tick(1 + len(text) - start)
            raise
        tick(1 + end - start)
        return value, end

    put(ast, "parse", counted_parse)
    put(json.JSONDecoder, "raw_decode", counted_decode)

    def taken():
        steps, Work.steps = Work.steps, 0
        return steps

    try:
        taken()
        yield taken
    finally:
        for owner, name, value in reversed(saved):
            setattr(owner, name, value)
        for module in modules:
            for value in vars(module).values():
                if (
                    hasattr(value, "cache_clear")
                    and getattr(value, "__module__", "") == module.__name__
                ):
                    value.cache_clear()


def calls_made(work, *args):
    """Functions called, in Python and C."""
    made = 0

    def count(frame, event, arg):
        nonlocal made
        made += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        result = work(*args)
    except UsageError as e:
        result = e
    finally:
        sys.setprofile(None)
    return made, result
