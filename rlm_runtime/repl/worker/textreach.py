"""How far a regular expression can look, read off its parse tree.

`Plan` bounds the reach of a match that starts at some character: single characters count one, a
repeat of a character class can go no further than the run of such characters that stands in the
text (`furthest`). What cannot be bounded is said so; one form of it, `head .*? tail` with DOTALL,
is told apart (`Lazy`).

Standard library only: this file runs inside the confined worker.
"""

from __future__ import annotations

import functools
import re
from re import _compiler, _constants, _parser

LOCAL = re.ASCII | re.LOCALE | re.UNICODE
LEAVES = {
    _constants.LITERAL,
    _constants.NOT_LITERAL,
    _constants.ANY,
    _constants.IN,
    _constants.RANGE,
}
REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT}
ANYTHING = [
    {_constants.CATEGORY_SPACE, _constants.CATEGORY_NOT_SPACE},
    {_constants.CATEGORY_WORD, _constants.CATEGORY_NOT_WORD},
    {_constants.CATEGORY_DIGIT, _constants.CATEGORY_NOT_DIGIT},
]


class Unbounded(Exception):
    """The pattern has a part whose reach the analysis cannot bound."""


class Plan:
    """`ops`: what bounds the reach of a match, in order: ("skip", n), ("run", class regex, at most
    n or None), ("either", [ops, ...]). `behind`: characters a match looks back. None for `ops`: no
    bound."""

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
                    out += (
                        self._ops(sub, flags) * most
                        if most * width > 1
                        else [("skip", most * width)]
                    )
                else:
                    out.append(self._run([sub], flags, None if endless else most * width))
            elif op in (_constants.FAILURE, _constants.SUCCESS):
                continue
            else:
                raise Unbounded
        return _merged(out)

    def _ahead(self, tree) -> int:
        """Characters the look-aheads inside can look at, which the width of the match does not
        count."""
        total = 0
        for op, av in tree:
            if op in (_constants.ASSERT, _constants.ASSERT_NOT) and av[0] > 0:
                total += av[1].getwidth()[1]
            total += sum(self._ahead(sub) for sub in _children(op, av))
        return total

    def _run(self, trees: list, flags: int, most: int | None):
        """A repeat of anything goes no further than the run of characters one of its parts can
        match."""
        leaves: dict[str, tuple] = {}
        flags = self._leaves(trees, flags, leaves, set())
        if not leaves:
            return ("skip", 0)
        state = _parser.State()
        state.flags = flags & ~(re.DEBUG | re.VERBOSE)
        parts = [_parser.SubPattern(state, [leaf]) for leaf in leaves.values()]
        one = (
            parts[0]
            if len(parts) == 1
            else _parser.SubPattern(state, [(_constants.BRANCH, (None, parts))])
        )
        many = [(_constants.MAX_REPEAT, (0, _constants.MAXREPEAT, one))]
        return ("run", _compiler.compile(_parser.SubPattern(state, many), state.flags), most)

    def _leaves(self, trees, flags: int, leaves: dict, seen: set) -> int:
        """Every single-character part, look-aheads included; returns the flags, the more generous
        where they differ."""
        for tree in trees:
            for op, av in tree:
                if op in LEAVES:
                    leaves[repr((op, av))] = (op, av)
                elif op is _constants.SUBPATTERN:
                    if (av[1] | av[2]) & LOCAL:
                        raise Unbounded
                    # a part with its own flags: the union of both readings, as IGNORECASE and
                    # DOTALL only add
                    if av[2] & re.IGNORECASE:
                        raise Unbounded
                    flags |= av[1] & (re.IGNORECASE | re.DOTALL)
                    flags = self._leaves([av[3]], flags, leaves, seen)
                elif op is _constants.GROUPREF:
                    if av not in seen:
                        seen.add(av)
                        flags = self._leaves([self.groups[av]], flags, leaves, seen)
                elif op in (_constants.AT, _constants.FAILURE, _constants.SUCCESS) or (
                    op in (_constants.ASSERT, _constants.ASSERT_NOT)
                    and av[0] < 0
                    and not self._ahead(av[1])
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
        """Set where the pattern is a row of bounded parts with lazy "anything" repeats between
        them, for which a match found in a window is the match of the whole text (see `Lazy`)."""
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
                if _mentions(item, _constants.GROUPREF) or _mentions(
                    item, _constants.GROUPREF_EXISTS
                ):
                    return None
                width = self._part([item]).getwidth()
                if first < i < last and width[0] != width[1]:
                    return None
            head, tail = (
                [item for item, _ in items[:first]],
                [item for item, _ in items[last + 1 :]],
            )
            lead, final = self._part(head), self._part(tail)
            low, high = lead.getwidth()
            tail_low, tail_high = final.getwidth()
            # the group that holds just the lazy part
            group = items[first][1] if low != high else None
            fixed_tail = tail_low if tail_low == tail_high and len(spots) == 1 else None
            if low != high and group is None and fixed_tail is None:
                return None
            within = sum(
                self._part([item]).getwidth()[1]
                for i, (item, _) in enumerate(items)
                if first < i < last and i not in spots
            )
            between = self._ops(
                self._part(
                    [
                        item
                        for i, (item, _) in enumerate(items)
                        if first < i < last and i not in spots
                    ]
                ),
                self.flags,
            )
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
        if (
            leaf is _constants.SUBPATTERN
            and value[0] is None
            and not value[1] | value[2]
            and len(value[3]) == 1
        ):
            leaf, value = value[3][0]
        if leaf is _constants.ANY:
            return bool(self.flags & re.DOTALL)
        if leaf is not _constants.IN or value[0][0] is _constants.NEGATE:
            return False
        categories = {v for kind, v in value if kind is _constants.CATEGORY}
        return any(both <= categories for both in ANYTHING)


class Lazy:
    """head .*? tail. A match found inside a window is final where (a) the text its tail can look at
    lies inside, and (b) the tail begins beyond what any other way of matching the head could reach:
    every earlier candidate of the search order would have found that same tail, so it failed for
    good and not for want of text."""

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
    return op is wanted or any(
        _mentions(below, wanted) for sub in _children(op, av) for below in sub
    )


def _merged(ops: list) -> list:
    out: list = []
    for op in ops:
        if op[0] == "skip" and out and out[-1][0] == "skip":
            out[-1] = ("skip", out[-1][1] + op[1])
        elif op != ("skip", 0):
            out.append(op)
    return out


@functools.lru_cache(512)
def plan_of(pattern: re.Pattern) -> Plan:
    return Plan(pattern)


def furthest(text, ops: list, position: int, limit: int) -> int:
    """An upper bound of how far a match from `position` looks; anything past `limit` is just
    "past"."""
    for op in ops:
        if position > limit:
            return position
        if op[0] == "skip":
            position += op[1]
        elif op[0] == "run":
            end = _run_end(
                text, op[1], position, limit if op[2] is None else min(limit, position + op[2])
            )
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
