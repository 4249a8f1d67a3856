"""Long-context tasks that are made offline, at any length, from a seed; and the engine that
measures them.

    from rlm_runtime import tasks
    task = tasks.get("s_niah")                      # or "s_niah:values=4,haystack=essay"
    example = task.example(128_000, seed=7, folder="sample/")
    task.score(example, "1234567")

`tasks.evaluate.evaluate` measures models on them (`rlm eval`). A new task is one file and one line
here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.tasks.base import Example, Task, parse_length

__all__ = ["TASKS", "Example", "Task", "get", "parse_length"]


@dataclass(frozen=True)
class Entry:
    where: str  # module:class
    about: str
    knobs: dict[str, Any] = field(default_factory=dict)


NIAH = "s_niah:SNiah"
TASKS: dict[str, Entry] = {
    "s_niah": Entry(NIAH, "one number hidden in noise (RULER niah_single_1)"),
    "s_niah_essay": Entry(
        NIAH, "one number hidden in prose (niah_single_2)", {"haystack": "essay"}
    ),
    "s_niah_uuid": Entry(
        NIAH,
        "one UUID hidden in prose (niah_single_3)",
        {"haystack": "essay", "value_type": "uuids"},
    ),
    "niah_multikey": Entry(
        NIAH,
        "four keys in prose, one is asked for (niah_multikey_1)",
        {"haystack": "essay", "keys": 4},
    ),
    "niah_needles": Entry(NIAH, "a needle among needles (niah_multikey_2)", {"haystack": "needle"}),
    "niah_uuids": Entry(
        NIAH,
        "a UUID among UUIDs (niah_multikey_3)",
        {"haystack": "needle", "key_type": "uuids", "value_type": "uuids"},
    ),
    "niah_multivalue": Entry(
        NIAH,
        "four values of one key in prose (niah_multivalue)",
        {"haystack": "essay", "values": 4},
    ),
    "niah_multiquery": Entry(
        NIAH,
        "four keys in prose, all asked for (niah_multiquery)",
        {"haystack": "essay", "queries": 4},
    ),
    "multi_round": Entry(
        "multi_round:MultiRound", "give back one of two replies to the same request (MRCR-style)"
    ),
    "multi_round_8": Entry(
        "multi_round:MultiRound",
        "one of eight replies to the same request (MRCR-style)",
        {"needles": 8},
    ),
    "oolong": Entry(
        "oolong:Oolong", "counting, user and time questions over unlabelled items (OOLONG-style)"
    ),
    "oolong_labelled": Entry(
        "oolong:Oolong", "the same with the labels written out", {"labelled": True}
    ),
    "oolong_pairs": Entry(
        "oolong_pairs:OolongPairs", "all pairs of users that meet a condition (OOLONG-Pairs-style)"
    ),
    "verbatim": Entry("verbatim:Verbatim", "give back one block of a text exactly"),
    "codeqa": Entry("codeqa:CodeQA", "questions about a source tree, answered by its syntax"),
}


def get(spec: str | Task, **knobs: Any) -> Task:
    """The task of a name, with knobs as keyword arguments or in the name:
    "s_niah:values=4,haystack=essay".

    Raises UsageError for an unknown task, knob or value.
    """
    if isinstance(spec, Task):
        return spec
    name, _, written = spec.partition(":")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        raise UsageError(
            f"unknown task {name!r}.{f' Did you mean {near[0]}?' if near else ''} Known: {', '.join(TASKS)}."
        )
    entry = TASKS[name]
    module, _, kind = entry.where.partition(":")
    made = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    allowed = inspect.signature(made).parameters
    given = {**_written_knobs(spec, written), **knobs}
    for knob in given:
        if knob not in allowed:
            raise UsageError(f"{name}: no knob {knob!r}. It takes {', '.join(allowed) or 'none'}.")
    try:
        task: Task = made(**{**entry.knobs, **given})
    except TypeError as error:
        raise UsageError(f"{spec}: {error}.") from None
    task.name = name + "".join(f"_{k}-{v}" for k, v in sorted(given.items())).translate(FILE_SAFE)
    task.about = entry.about
    return task


FILE_SAFE = str.maketrans({c: "_" for c in '/\\:*?"<>| '})


def _written_knobs(spec: str, written: str) -> dict[str, Any]:
    knobs: dict[str, Any] = {}
    for pair in filter(None, written.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"task {spec!r}: expected name:knob=value,knob=value.")
        low = value.strip().lower()
        try:
            knobs[name.strip()] = (
                {"true": True, "false": False}[low] if low in ("true", "false") else int(value)
            )
        except ValueError:
            knobs[name.strip()] = value.strip()
    return knobs
