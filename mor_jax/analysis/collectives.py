"""Which collectives a compiled step runs: kind, how often, over which mesh axes, how many bytes.

Read off the text of the compiled program (`jax.stages.Compiled.as_text()`). A collective inside a
loop counts as often as the loop runs; of a conditional, the branch that moves the most bytes
counts.

XLA for TPUs overlaps a gather with the products around it: it writes the same gather into each of
several fusions, the first of which starts it, the last of which ends it, and gives all of them one
`chain_id`. Together they are one gather.

Bytes are those a device sends over its links in a ring of n devices (all figures per device and per
step):

    all-gather           (n - 1) / n of the gathered array
    reduce-scatter       (n - 1) / n of the array before it is scattered
    all-reduce           2 (n - 1) / n of the array (a reduce-scatter, then an all-gather)
    all-to-all           (n - 1) / n of the array
    collective-permute   the array
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|c\d+)\[([\d,]*)\]")
_OP = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_COUNTED = re.compile(r"^\s*ROOT .*\bcompare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")


@dataclass(frozen=True)
class Collective:
    """One instruction of the compiled program."""

    kind: str
    shapes: tuple[str, ...]  # of its results, e.g. "f32[16,64]"
    payload: int  # bytes of the whole array, before or after, whichever is larger
    groups: tuple[tuple[int, ...], ...]  # device numbers that talk to each other
    axes: tuple[str, ...] = ()  # mesh axes the groups span
    times: int = 1  # runs a step
    in_loop: bool = False
    source: str = ""  # where in the traced program it comes from
    chain: str = ""  # of the pieces of one collective, the same name

    @property
    def group_size(self) -> int:
        return len(self.groups[0]) if self.groups else 1

    @property
    def wire_bytes(self) -> float:
        """Bytes each device sends, all runs of a step together."""
        n = self.group_size
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(
            self.kind, (n - 1) / n
        )
        return self.times * share * self.payload


def read_collectives(hlo: str, mesh_shape: Mapping[str, int] | None = None) -> list[Collective]:
    """The collectives of one run of the program `hlo`, those that have nobody to talk to left out.

    Args:
      hlo: text of a compiled program.
      mesh_shape: sizes of the mesh axes in device order, to name the axes that each collective
        spans.
    """
    bodies, entry = computations(hlo)
    found: list[Collective] = []
    _walk(bodies, entry, 1, False, found)
    found = [c for c in _joined(found) if c.group_size > 1]
    if mesh_shape is None:
        return found
    return [replace(c, axes=axes_of(c.groups, mesh_shape)) for c in found]


def summary(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """By "kind over axes": count and bytes a device sends, per step. JSON-ready."""
    table: dict[str, dict[str, float]] = {}
    for c in collectives:
        row = table.setdefault(
            f"{c.kind} over {'+'.join(c.axes) or '?'}", {"count": 0, "bytes": 0.0}
        )
        row["count"] += c.times
        row["bytes"] += c.wire_bytes
    return dict(sorted(table.items()))


def axes_of(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ."""
    # [axis, member, group]
    places = np.array(np.unravel_index(np.asarray(groups).T, tuple(mesh_shape.values())))
    differ = (places != places[:, :1]).any(axis=(1, 2))
    return tuple(name for name, d in zip(mesh_shape, differ, strict=True) if d)


def array_bytes(text: str) -> list[int]:
    """Sizes of the arrays named in a piece of program text."""
    sizes = []
    for dtype, dims in _ARRAY.findall(text):
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
        sizes.append(math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return sizes


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a program by its name, and the name of the first."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in hlo.splitlines():
        head = _HEAD.match(line)
        if head and "=" not in line.split("(")[0]:
            lines = bodies.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        # "}}" is inside of a kernel's description, which runs over lines
        elif re.match(r"\}(\s|$)", line):
            lines = None
        elif lines is not None:
            lines.append(line)
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return bodies, entry


def _walk(
    bodies: dict[str, list[str]], name: str, times: int, in_loop: bool, found: list[Collective]
) -> None:
    for line in bodies.get(name, ()):
        if op := _OP.match(line):
            found.append(replace(_collective(op, line), times=times, in_loop=in_loop))
        if branches := _BRANCHES.search(line):
            each = [name.strip().lstrip("%") for name in branches.group(1).split(",")]
            _heaviest(bodies, each, times, in_loop, found)
            continue
        if " conditional(" in line:
            _heaviest(bodies, _CALLED.findall(line), times, in_loop, found)
            continue
        loop = " while(" in line
        runs = times * trips(bodies, line) if loop else times
        for called in _CALLED.findall(line):
            _walk(bodies, called, runs, in_loop or loop, found)


def trips(bodies: dict[str, list[str]], loop: str) -> int:
    """How often a loop runs: as the compiler says, or else what its counter, from 0 by 1, is
    compared with; 1 where that is not known."""
    if known := _TRIPS.search(loop):
        return int(known.group(1))
    condition = _CONDITION.search(loop)
    lines = bodies.get(condition.group(1), []) if condition else []
    for bound in filter(None, map(_COUNTED.match, lines)):
        for line in lines:
            if number := re.match(
                rf"^\s*%?{re.escape(bound.group(1))} = [su]32\[\]\S* constant\((\d+)\)", line
            ):
                return int(number.group(1))
    return 1


def _joined(found: Iterable[Collective]) -> list[Collective]:
    """Of the pieces of one collective, the first."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for c in found:
        if not c.chain or (c.kind, c.chain) not in seen:
            kept.append(c)
        seen.add((c.kind, c.chain))
    return kept


def _heaviest(
    bodies: dict[str, list[str]],
    branches: list[str],
    times: int,
    in_loop: bool,
    found: list[Collective],
) -> None:
    runs: list[list[Collective]] = []
    for branch in branches:
        runs.append([])
        _walk(bodies, branch, times, in_loop, runs[-1])
    found += max(runs, key=lambda run: sum(c.wire_bytes for c in _joined(run)), default=[])


def _collective(op: re.Match[str], line: str) -> Collective:
    result, kind, start = op.groups()
    shapes = tuple(f"{dtype}[{dims}]" for dtype, dims in _ARRAY.findall(result))
    sizes = array_bytes(result)
    if start and kind == "all-gather":  # (operands, results)
        shapes, sizes = shapes[len(shapes) // 2 :], sizes[len(sizes) // 2 :]
    if start and kind == "collective-permute":  # (operand, result, contexts)
        shapes, sizes = shapes[1:2], sizes[1:2]
    groups = _groups(line, kind)
    scale = len(groups[0]) if kind == "reduce-scatter" and groups else 1
    name, chain = re.search(r'op_name="([^"]*)"', line), re.search(r'chain_id="([^"]*)"', line)
    return Collective(
        kind,
        shapes,
        scale * sum(sizes),
        groups,
        source=name.group(1) if name else "",
        chain=chain.group(1) if chain else "",
    )


def _groups(line: str, kind: str) -> tuple[tuple[int, ...], ...]:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        return (
            tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs.group(0)))
            if pairs
            else ()
        )
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
        line,
    ):
        return _named_groups(*named.groups())
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
        return tuple(
            tuple(int(d) for d in g.split(",") if d)
            for g in re.findall(r"\{([\d, ]*)\}", listed.group(1))
        )
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return tuple(
            map(
                tuple, _iota(tiled.group(2), tiled.group(3)).reshape(_ints(tiled.group(1))).tolist()
            )
        )
    return ()


def _named_groups(
    mesh: str, dims: str | None, order: str | None, axes: str
) -> tuple[tuple[int, ...], ...]:
    """Groups written as axes of a mesh of the compiler's own: `mesh['a'=4,'b'=2],
    device_ids=([2,4]T(1,0)) {'a'}`; a part of an axis is `'a':(1)2`, the second factor of size 2
    after one of size 1."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    shape: list[int] = []
    picked: list[int] = []
    for name, size in sizes.items():
        # Cut the axis where parts of it begin and end.
        parts = [(int(a or 1), int(b or size)) for n, a, b in wanted if n == name]
        cuts = sorted({1, size} | {a for a, _ in parts} | {a * b for a, b in parts})
        for low, high in itertools.pairwise(cuts):
            picked += [len(shape)] if any(a <= low and high <= a * b for a, b in parts) else []
            shape.append(high // low)
    ids = _iota(dims or str(math.prod(sizes.values())), order).reshape(shape)
    rest = [i for i in range(len(shape)) if i not in picked]
    size = math.prod(shape[i] for i in picked)
    return tuple(map(tuple, ids.transpose(rest + picked).reshape(-1, size).tolist()))


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(","))
