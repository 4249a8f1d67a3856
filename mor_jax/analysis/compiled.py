"""A plan held against what a compiler says of the same step (`train/aot.py`)."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mor_jax.analysis import units
from mor_jax.analysis.plan import Plan

# bytes a device: what is planned as "small" or not at all, and sent by fewer of them, is not
# compared
SMALL = 1 << 16


def against_the_plan(found: Plan, report: dict[str, Any]) -> dict[str, Any]:
    """Bytes a device needs and sends, planned and compiled; JSON-ready. `report`: of
    `train.aot.step_report`.

    Sums are taken over kinds and axes of collectives: compilers join several into one, and may send
    a reduction as a scatter and a gather or the other way round."""
    kinds = sorted(
        {p.kind for p in found.collectives}
        | {name.partition(" over ")[0] for name in report["collectives"]}
    )
    planned = {kind: sum(p.bytes for p in found.collectives if p.kind == kind) for kind in kinds}
    sent = {kind: _sum(report["collectives"], kind, "bytes") for kind in kinds}
    return {
        "bytes": _pair(found.memory.total, report["bytes"]["total"]),
        "hbm": _pair(found.costs()[0].bytes, report["hbm"]),
        "sent": _pair(sum(planned.values()), sum(sent.values())),
        "sent by kind": {
            k: _pair(planned[k], sent[k]) for k in kinds if max(planned[k], sent[k]) >= SMALL
        },
    }


def _pair(planned: float, compiled: float) -> dict[str, float | None]:
    return {
        "planned": planned,
        "compiled": compiled,
        "off": planned / compiled - 1 if compiled else None,
    }


def _sum(table: dict[str, dict[str, float]], kind: str, column: str) -> float:
    return sum(row[column] for name, row in table.items() if name.partition(" over ")[0] == kind)


def compiled_tables(found: Plan, report: dict[str, Any]) -> list[Table | Text]:
    """What a person wants to see of a compiled step beside its plan."""
    seconds, lines = report["seconds"], report["lines"]
    head = Text.assemble(("compiled", "bold"), f" in {units.duration(seconds['compile'])}")
    head.append(
        f" ({units.duration(seconds['compile_cpu'])} of all processors) after {seconds['trace']:.1f} s of "
    )
    head.append(f"tracing; {lines['written']:,} lines as written, {lines['compiled']:,} compiled")
    traffic = Table(
        "collectives a step, compiled",
        "times",
        "of them in loops",
        "bytes a device",
        box=box.SIMPLE,
    )
    for name, row in report["collectives"].items():
        inside = report["in loops"].get(name, {"count": 0})["count"]
        traffic.add_row(name, str(row["count"]), str(inside), units.size(row["bytes"]))
    against = against_the_plan(found, report)
    table = Table("against the plan", "planned", "compiled", "plan is off by", box=box.SIMPLE)
    rows = {"needed a device": against["bytes"], "moved to and from memory": against["hbm"]}
    rows["sent a step"] = against["sent"]
    rows |= {f"  {kind}": pair for kind, pair in against["sent by kind"].items()}
    for name, pair in rows.items():
        off = units.NONE if pair["off"] is None else f"{pair['off']:+.1%}"
        table.add_row(name, units.size(pair["planned"]), units.size(pair["compiled"]), off)
    return [head, traffic, table]
