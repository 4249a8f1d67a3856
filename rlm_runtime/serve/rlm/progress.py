"""Short progress notes, made from a run's events, for clients to show while they wait."""

from __future__ import annotations

import re
import time
from typing import Any

from rlm_runtime.trajectory import CellEnd, CellStart, NodeEnd, NodeStart, Nudged, Replied

CODE, OUTPUT = 2_000, 1_000  # characters of a cell and of its output
EVERY = 0.5  # seconds between two counts of sub-calls


class Progress:
    """`note(event)` gives a small object for what is worth telling, None for the rest."""

    def __init__(self) -> None:
        self._running = self._done = self._failed = 0
        self._told = 0.0

    def note(self, event: Any) -> dict[str, Any] | None:
        match event:
            case Replied():
                usage = event.usage
                return {
                    "event": "turn",
                    "node": event.node,
                    "turn": event.turn,
                    "seconds": round(event.seconds, 3),
                    "input_tokens": usage.input_tokens,
                    "output_tokens": usage.output_tokens,
                }
            case CellStart():
                return {
                    "event": "cell",
                    "node": event.node,
                    "turn": event.turn,
                    "cell": event.cell,
                    "code": event.code[:CODE],
                }
            case CellEnd():
                result = event.result
                out = (
                    result.stdout
                    if result.error is None
                    else f"{result.error.type}: {result.error.message}"
                )
                return {
                    "event": "output",
                    "node": event.node,
                    "turn": event.turn,
                    "cell": event.cell,
                    "status": result.status,
                    "text": out[:OUTPUT],
                }
            case Nudged():
                return {
                    "event": "nudge",
                    "node": event.node,
                    "turn": event.turn,
                    "reason": event.reason,
                }
            case NodeStart():
                self._running += 1
                return self._calls(force=False)
            case NodeEnd():
                self._running = max(0, self._running - 1)
                self._done += 1
                self._failed += event.error is not None
                return self._calls(force=not self._running)
        return None

    def _calls(self, force: bool) -> dict[str, Any] | None:
        now = time.monotonic()
        if not force and now - self._told < EVERY:
            return None
        self._told = now
        return {
            "event": "calls",
            "running": self._running,
            "done": self._done,
            "failed": self._failed,
        }


def line(note: dict[str, Any]) -> str:
    """A note as a line a person can read, without control characters."""
    kind = note["event"]
    where = (
        f"turn {note['turn']}" + (f" of {note['node']}" if note.get("node", "0") != "0" else "")
        if "turn" in note
        else ""
    )
    if kind == "turn":
        text = f"{where}: {note['output_tokens']} tokens in {note['seconds']:.1f} s"
    elif kind == "cell":
        text = f"{where}, code: {note['code'][:200]}"
    elif kind == "output":
        text = f"{where}, {note['status']}: {note['text'][:200]}"
    elif kind == "calls":
        text = f"sub-calls: {note['done']} done, {note['running']} running, {note['failed']} failed"
    else:
        text = f"{where}: reminded of the format ({note['reason']})"
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()
