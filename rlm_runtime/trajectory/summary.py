"""What a run came to, from its events alone: also for a run that was killed and has no end.

A session's file holds several completions: turns, usage and time are then of all of them, the rest
is of the latest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from rlm_runtime.lms.base import Frozen, Usage
from rlm_runtime.trajectory.events import (
    AnyEvent,
    CellEnd,
    ContextLoaded,
    NodeEnd,
    NodeStart,
    Replied,
    RunEnd,
    RunStart,
    SandboxUp,
)


class Summary(Frozen):
    run: str = ""
    started_at: str = ""
    question: str | None = None
    root: str = ""
    sub: str = ""
    context: str = ""  # "file, 40,000,000 characters"
    sandbox: str = ""
    stop_reason: str = "unfinished"  # RunEnd.stop_reason; unfinished: killed, or still running
    answer: Any = None
    error: str | None = None
    complete: bool = False
    turns: int = 0  # of the root
    cells: int = 0  # of all nodes
    calls: int = 0  # sub-calls of all nodes: LM calls, child RLMs and tools
    failed_calls: int = 0
    failed_cells: int = 0
    depth: int = 0  # the deepest node
    usage: Usage = Usage()
    usage_by_depth: dict[str, Usage] = Field(default_factory=dict)
    seconds: float = 0.0

    @property
    def cost_usd(self) -> float | None:
        return self.usage.cost_usd


def summary(events: Iterable[AnyEvent]) -> Summary:
    """Counts as recorded; tokens from `RunEnd` where every run has one, else summed over the
    replies there are."""
    found: dict[str, Any] = {}
    depth_of, kind_of = {"0": 0}, {"0": "rlm"}
    by_depth: dict[str, Usage] = {}
    ends: list[RunEnd] = []
    cells = calls = failed_calls = failed_cells = turns = runs = 0
    seconds = last = 0.0  # of the completions before, of the latest
    for event in events:
        root = event.node == "0"
        if isinstance(event, RunStart) and root:
            runs, seconds, last = runs + 1, seconds + last, 0.0
        last = max(last, event.t)
        match event:
            case RunStart() if root:
                found |= {
                    k: getattr(event, k) for k in ("run", "started_at", "question", "root", "sub")
                }
                found |= {
                    "complete": False,
                    "stop_reason": "unfinished",
                    "answer": None,
                    "error": None,
                }
            case ContextLoaded() if root:
                size = f"{event.chars:,} characters" if event.chars is not None else None
                size = size or (f"{event.bytes:,} bytes" if event.bytes is not None else None)
                found["context"] = ", ".join(filter(None, (event.kind, size)))
            case SandboxUp() if root:
                found["sandbox"] = f"{event.environment}: " + ", ".join(
                    f"{k} {v}" for k, v in event.layers.items()
                )
            case NodeStart():
                depth_of[event.node], kind_of[event.node] = event.depth, event.kind
                calls += 1
            case NodeEnd():
                failed_calls += event.error is not None
                # a child RLM's usage is in its own replies and calls
                if kind_of.get(event.node) != "rlm":
                    _add(by_depth, depth_of.get(event.node, event.node.count(".")), event.usage)
            case Replied():
                turns += root
                _add(by_depth, depth_of.get(event.node, event.node.count(".")), event.usage)
            case CellEnd():
                cells += 1
                failed_cells += event.result.status != "ok"
            case RunEnd() if root:
                ends.append(event)
                last = event.seconds or last
                found |= {k: getattr(event, k) for k in ("stop_reason", "answer", "error")} | {
                    "complete": True
                }
    if ends and len(ends) == max(runs, 1):
        by_depth, turns = {}, sum(e.turns for e in ends)
        for end in ends:
            for depth, usage in end.usage_by_depth.items():
                _add(by_depth, depth, usage)
        usage = sum((e.usage for e in ends), Usage())
    else:
        usage = sum(by_depth.values(), Usage())
    return Summary(
        turns=turns,
        cells=cells,
        calls=calls,
        failed_calls=failed_calls,
        failed_cells=failed_cells,
        depth=max(depth_of.values()),
        usage=usage,
        usage_by_depth={k: v for k, v in sorted(by_depth.items()) if v != Usage()},
        seconds=seconds + last,
        **found,
    )


def _add(by_depth: dict[str, Usage], depth: int | str, usage: Usage) -> None:
    by_depth[str(depth)] = by_depth.get(str(depth), Usage()) + usage
