"""What an expert is: problems of a task, and strategies that solve them turn by turn.

A strategy is a generator: it yields the replies of a root model and is sent what the runtime said
to each. So it acts on real reports, as a model does, and may only use what stands in them and in
the question. A new task's expert is one file in `experts/` with an `EXPERT`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlm_runtime.errors import UsageError
from rlm_runtime.tasks import TASKS, Task
from rlm_runtime.tasks.base import Example


@dataclass(frozen=True)
class Say:
    """A reply of the root: a cell. `weight` 0: it is shown and not trained on, as a mistake that is
    then put right."""

    code: str
    weight: float = 1.0

    @property
    def text(self) -> str:
        return f"```repl\n{self.code}\n```"


Turns = Generator[Say, str, None]


@dataclass(frozen=True)
class Problem:
    """An example of a task in the words of a split.

    `sub` answers a prompt of a cell: what a perfect reader would say. `facts` are for the
    strategies of this expert: only things that stand in the question or that a model can see in the
    report it answers.
    """

    task: Task
    example: Example
    split: str
    sub: Callable[[str], str]
    facts: Mapping[str, object] = field(default_factory=dict)
    template: str = ""  # the phrasings it was made with, for provenance


@dataclass(frozen=True)
class Strategy:
    """`child`: what leads a child RLM, for strategies that start one (depth 2)."""

    run: Callable[[Problem, random.Random], Turns]
    # given the child's question
    child: Callable[[Problem, random.Random, str], Turns] | None = None


@dataclass(frozen=True)
class Expert:
    """`problem(spec, length, seed, index, split, folder)` makes an example of the task `spec`;
    `strategies` by name."""

    tasks: tuple[str, ...]
    problem: Callable[[str, int, int, int, str, Path], Problem]
    strategies: Mapping[str, Strategy]


@functools.cache
def experts() -> dict[str, Expert]:
    """The expert of each task, from the files in `experts/`."""
    from rlm_runtime.training import experts as folder

    found: dict[str, Expert] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        found.update(dict.fromkeys(module.EXPERT.tasks, module.EXPERT))
    return found


def expert_of(name: str) -> Expert:
    """Raises UsageError for a task that is unknown or has no expert."""
    known = experts()
    base = name.partition(":")[0]
    if base not in known:
        why = "has no expert program" if base in TASKS else "is unknown"
        raise UsageError(f"task {name!r} {why}. There are experts for: {', '.join(sorted(known))}.")
    return known[base]


def done(expression: str) -> str:
    """Code that hands in the value of an expression."""
    return f'answer["content"] = {expression}\nanswer["ready"] = True'


def quoted(text: str) -> str:
    """A Python literal in double quotes where that needs no escapes."""
    return f'"{text}"' if text.isprintable() and not set('"\\') & set(text) else repr(text)
