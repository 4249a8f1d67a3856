"""The runtime's tasks in the words of a split, as tasks of their own: `s_niah@heldout`.

`rlm eval` measures with them what a model makes of sentences, questions, marks and strings that it
was not trained on; other tasks of the experts, `absent`, `injected` and `outside`, exist in this
form alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlm_runtime import tasks
from rlm_runtime.tasks.base import Example, Ruler, Task
from rlm_runtime.training.expert import expert_of
from rlm_runtime.training.splits import HELDOUT, check_split, seed_of

MARK = "@"


class Reworded(Task):
    """A task of an expert, its texts and questions said anew.

    Args:
      spec: a task with an expert.
      split: whose words.
    Raises:
      UsageError: no such task, expert or split.
    """

    def __init__(self, spec: str, split: str = HELDOUT):
        self._expert, self._spec, self._split = expert_of(spec), spec, check_split(split)
        self.name, self.about = f"{spec}{MARK}{split}", f"{spec} in the words of {split}"
        self._tasks: dict[str, Task] = {}  # by example: an expert may draw from several

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        own = folder / f"{self._spec}-{self._split}-{length}-{seed}-{index}".replace(":", "_")
        problem = self._expert.problem(
            self._spec, length, seed_of(seed, self._split), index, self._split, own
        )
        self._tasks[problem.example.id] = problem.task
        return problem.example

    def score(self, example: Example, reply: Any) -> float:
        return self._tasks[example.id].score(example, reply)


def get(spec: str | Task) -> Task:
    """As `tasks.get`, and `<task>@<split>`.

    Raises UsageError.
    """
    if isinstance(spec, str) and MARK in spec:
        return Reworded(*spec.split(MARK, 1))
    return tasks.get(spec)
