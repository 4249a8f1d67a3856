"""Writes metrics to `metrics.jsonl` (one JSON object a line) and to TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricWriter:
    """Appends records; on resume, records of steps that will be run again are dropped first.

    Args:
      workdir: the run directory.
      resume_step: steps after this one are forgotten (they come again with the same numbers).
      active: False on all hosts but one; then nothing is written.
    """

    def __init__(self, workdir: Path, *, resume_step: int = 0, active: bool = True):
        self._file = self._board = None
        if not active:
            return
        path = workdir / FILE
        if path.exists():
            _forget_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record; values are numbers, None or lists of numbers."""
        if self._file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        record = {"kind": kind, "step": step, **finite}  # JSON has no infinity
        self._file.write(json.dumps(record, allow_nan=False, default=float) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Writes buffered records to disk."""
        if self._file is not None:
            self._file.flush()
            self._board.flush()

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
            self._board.close()


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
