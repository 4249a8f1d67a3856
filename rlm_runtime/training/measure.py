"""Success at the runtime's tasks as a measure of a model in training: it leads real runs, root and
sub at once.

from rlm_runtime.training.measure import TaskSuccess
train(cfg, "runs/native", measure=TaskSuccess(["s_niah"], ["8k"], samples=16))
"""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlm_runtime.lms.checkpoint import CheckpointLM
from rlm_runtime.tasks.evaluate import evaluate
from rlm_runtime.tasks.results import Row
from rlm_runtime.trajectory import Nudged, read

SEED = 43  # of the samples: not the default of `rlm eval`, which measures what comes out at the end


class TaskSuccess:
    """Called with a loaded model, runs `samples` of each task at each length (tokens).

    Returns, by "rlm/<task>/<length>/": success (share of runs with score 1), score, turns,
    sub_calls, and format_errors (replies in a run that the runtime had to object to: no code, code
    that cannot be read). The engine's programs are compiled once and get the new weights each time.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        lengths: Sequence[int | str],
        samples: int = 16,
        seed: int = SEED,
    ):
        self._tasks, self._lengths, self._samples, self._seed = (
            list(tasks),
            list(lengths),
            samples,
            seed,
        )
        self._lm: CheckpointLM | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        if self._lm is None:
            self._lm = CheckpointLM(f"step {model.step}", model=model, max_tokens=256)
        else:
            self._lm.set_params(model.params)
        with tempfile.TemporaryDirectory(prefix="rlm-measure-") as folder:
            done = evaluate(
                self._tasks,
                self._lengths,
                ("rlm",),
                root=self._lm,
                samples=self._samples,
                seed=self._seed,
                out=Path(folder) / "out",
                rlm={"log_dir": Path(folder) / "runs", "budget": {"turns": 8}},
                plot=False,
            )
            return record(done.rows)


def record(rows: Sequence[Row]) -> dict[str, float]:
    """The numbers of `TaskSuccess` from rows of an evaluation whose trajectories are there."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"rlm/{row.task}/{row.length}", []).append(row)
    found: dict[str, float] = {}
    for name, runs in groups.items():
        objections = Counter(
            row.index
            for row in runs
            if row.trajectory
            for e in read(row.trajectory)
            if is_format(e)
        )
        found |= {
            f"{name}/success": statistics.fmean(float(row.score == 1) for row in runs),
            f"{name}/score": statistics.fmean(row.score or 0.0 for row in runs),
            f"{name}/turns": statistics.fmean(row.turns for row in runs),
            f"{name}/sub_calls": statistics.fmean(row.sub_calls for row in runs),
            f"{name}/format_errors": objections.total() / len(runs),
        }
    return found


def is_format(event: Any) -> bool:
    return isinstance(event, Nudged)
