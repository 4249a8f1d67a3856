"""Writes metrics to `metrics.jsonl`, one JSON object a line, and hands them to trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mor_jax.paths import reason
from mor_jax.train.trackers import Tracker, scalars

FILE = "metrics.jsonl"


class MetricWriter:
    """Appends records; on resume, records of steps that will be run again are dropped first.

    Args:
      workdir: the run directory.
      resume_step: steps after this one are forgotten (they come again with the same numbers).
      active: False on all hosts but one; then nothing is written.
      trackers: what else gets the numbers, by name. One that raises is left out from then on, with
        a line to `say`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int = 0,
        active: bool = True,
        trackers: Mapping[str, Tracker] | None = None,
        say: Callable[[str], None] = print,
    ):
        self._file, self._trackers, self._say = None, dict(trackers or {}), say
        if not active:
            return
        path = workdir / FILE
        if path.exists():
            _forget_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record; values are numbers, None or lists of numbers."""
        if self._file is None:
            return
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        record = {"kind": kind, "step": step, **finite}  # JSON has no infinity
        self._file.write(json.dumps(record, allow_nan=False, default=float) + "\n")
        self._each("write", kind, step, scalars(values))

    def flush(self) -> None:
        """Writes buffered records to disk."""
        if self._file is not None:
            self._file.flush()
            self._each("flush")

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
            self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as e:  # each has its own kinds; the record is in metrics.jsonl
                del self._trackers[name]
                self._say(
                    f"The tracker {name} gets no more records: {reason(e)}. metrics.jsonl has them all."
                )


def _forget_after(path: Path, step: int) -> None:
    """Keep the records up to `step`; a line cut short by a kill goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)
