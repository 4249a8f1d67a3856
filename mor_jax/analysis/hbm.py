"""Bytes that one run of a compiled program reads from and writes to a device's memory (HBM).

Read off the text of the compiled program, like its collectives (`analysis/collectives.py`): each
instruction reads its operands and writes its result once. A loop counts as often as it runs; of a
conditional, the branch that moves the most. What XLA for TPUs keeps in vector memory (memory space
1) is not HBM's. Of an array that is only sliced, the slice is read; of one that is updated in
place, the update is read and written.

Left out: padding to a register's tiles, and what a kernel (a custom call) reads more than once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from mor_jax.analysis.collectives import array_bytes, computations, trips

_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(?:pred|bf16|f8\w*|[suf]\d+|c\d+)\[[\d,]*\](?:\{[^}]*\})?")
_CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|_computation=%?([\w.\-]+))")
# What moves nothing: names for arrays that are there, and ends of what was counted at its start.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|replica-id"
    "|opt-barrier|domain|add-dependency|async-update|.*-done"
)
_VIEWS = frozenset({"bitcast", "reshape", "transpose", "copy", "convert"})


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    rest: str  # operands and attributes

    @cached_property
    def operands(self) -> list[str]:
        depth, end = 1, len(self.rest)
        for i, c in enumerate(self.rest):
            depth += (c == "(") - (c == ")")
            if not depth:
                end = i
                break
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    @property
    def index(self) -> int:
        return int(self.rest.partition(")")[0])


def traffic(hlo: str) -> float:
    """Bytes of one run of the program `hlo` (`jax.stages.Compiled.as_text()`), read and written."""
    bodies, entry = computations(hlo)
    return _Reader(bodies).moved(entry)


class _Reader:
    def __init__(self, bodies: dict[str, list[str]]):
        self._lines = bodies
        self._parsed: dict[str, list[_Instruction]] = {}
        self._sums: dict[str, float] = {}

    def _body(self, name: str) -> list[_Instruction]:
        if name not in self._parsed:
            found = map(_LINE.match, self._lines.get(name, ()))
            self._parsed[name] = [_Instruction(*m.groups()) for m in found if m]
        return self._parsed[name]

    def moved(self, name: str) -> float:
        if name not in self._sums:
            body = self._body(name)
            shapes = {i.name: i.shape for i in body}
            self._sums[name] = sum(self._of(i, shapes) for i in body)
        return self._sums[name]

    def _of(self, i: _Instruction, shapes: dict[str, str]) -> float:
        if _FREE.fullmatch(i.op):
            return 0.0
        if i.op == "while":
            body = _BODY.search(i.rest)
            return trips(self._lines, i.rest) * self.moved(body.group(1)) if body else 0.0
        if i.op == "conditional":
            named = [a or b for a, b in _BRANCHES.findall(i.rest)]
            each = [n.strip().lstrip("%") for names in named for n in names.split(",")]
            return max(map(self.moved, each), default=0.0)
        called = _CALLED.search(i.rest)
        if i.op in ("call", "async-start") and called:
            return self.moved(called.group(1))
        if i.op == "fusion" and called:
            return self._fused(i, called.group(1), shapes)
        sizes = [_hbm(shapes.get(n, "")) for n in i.operands]
        if i.op in ("dynamic-slice", "slice", "gather"):
            sizes[:1] = [_slice(sizes[:1], i.shape)]
        if i.op == "dynamic-update-slice":
            return sum(sizes[1:]) + sizes[1] if len(sizes) > 1 else 0.0
        if i.op.endswith("-start"):  # its shape repeats the operands
            return sum(sizes) + max(0.0, _hbm(i.shape) - sum(sizes))
        return sum(sizes) + _hbm(i.shape)

    def _fused(self, i: _Instruction, called: str, shapes: dict[str, str]) -> float:
        """Of a fusion: what it takes of its operands, and its results."""
        body = self._body(called)
        by_name = {b.name: b for b in body}
        users: dict[str, list[tuple[_Instruction, int]]] = {}
        for b in body:
            for place, name in enumerate(b.operands):
                users.setdefault(name, []).append((b, place))

        def taken(name: str, whole: float) -> float:
            """Bytes of an array of `whole` bytes that its users read."""
            total = 0.0
            for user, place in users.get(name, []):
                if user.op in ("dynamic-slice", "slice", "gather") and place == 0:
                    total += min(whole, sum(array_bytes(user.shape)))
                elif user.op == "dynamic-update-slice" and place == 0:
                    continue  # in place
                elif user.op in _VIEWS and users.get(user.name):
                    total += taken(user.name, whole)
                else:
                    return whole
            return min(whole, total)

        def written(name: str) -> float:
            """Bytes of a result."""
            b = by_name[name]
            while b.op in _VIEWS and b.operands and b.operands[0] in by_name:
                b = by_name[b.operands[0]]
            if b.op == "dynamic-update-slice" and b.operands[1:2]:
                return sum(array_bytes(by_name[b.operands[1]].shape))
            return sum(array_bytes(by_name[name].shape))

        read = 0.0
        for b in body:
            if b.op == "parameter" and b.index < len(i.operands):
                whole = _hbm(shapes.get(i.operands[b.index], ""))
                read += taken(b.name, whole) if whole else 0.0
        root = body[-1] if body else None
        results = root.operands if root and root.op == "tuple" else [root.name] if root else []
        outer = _ARRAY.findall(i.shape)
        # in place of what lies in vector memory: nothing
        sizes = [written(n) if _hbm(s) else 0.0 for n, s in zip(results, outer, strict=False)]
        return read + sum(sizes)


def _slice(whole: list[float], shape: str) -> float:
    return min(whole[0], float(sum(array_bytes(shape)))) if whole else 0.0


def _hbm(shape: str) -> float:
    """Bytes of the arrays of a shape that lie in the default memory space."""
    found = _ARRAY.findall(shape)
    return float(sum(sum(array_bytes(a)) for a in found if not re.search(r"S\([1-9]\d*\)", a)))
