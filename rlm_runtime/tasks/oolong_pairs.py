"""OOLONG-Pairs-style tasks: all pairs of users that meet a condition on the kinds of their
questions. The answer grows with the square of the context, which is the point. The twenty
conditions are those of the appendix of the Recursive Language Models paper (Zhang et al. 2025); the
windows are those of `oolong.py`, without labels.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlm_runtime.tasks.base import Example, Ruler, text_of
from rlm_runtime.tasks.label_bank import ABBREVIATION, DESCRIPTION, ENTITY, HUMAN, LOCATION, NUMERIC
from rlm_runtime.tasks.oolong import Oolong, Window, written

PAIR = re.compile(r"\(?\s*\b(\d{5})\b\s*[,;]\s*(\d{5})\b\s*\)?")

# 1-10: both users have a question of one of two labels; some hold all questions of a label to one
# side of a date
Day = datetime.date
EITHER: dict[int, tuple[str, str, tuple[str, str, Day] | None]] = {
    1: (NUMERIC, LOCATION, None),
    2: (ENTITY, HUMAN, None),
    3: (DESCRIPTION, ABBREVIATION, None),
    4: (HUMAN, LOCATION, (HUMAN, "after", Day(2023, 1, 6))),
    5: (ENTITY, NUMERIC, (ENTITY, "before", Day(2023, 3, 15))),
    6: (LOCATION, ABBREVIATION, None),
    7: (DESCRIPTION, NUMERIC, (NUMERIC, "after", Day(2023, 2, 1))),
    8: (HUMAN, DESCRIPTION, None),
    9: (ENTITY, LOCATION, (LOCATION, "after", Day(2023, 4, 10))),
    10: (NUMERIC, ABBREVIATION, (ABBREVIATION, "before", Day(2023, 5, 20))),
}
# 11-20: one user meets the first list, the other the second: (label, how many, exactly or at least)
Part = tuple[tuple[str, int, bool], ...]
ONE, MORE = True, False
ACROSS: dict[int, tuple[Part, Part]] = {
    11: (((ENTITY, 1, MORE), (ABBREVIATION, 1, MORE)), ((ENTITY, 1, ONE),)),
    12: (((NUMERIC, 2, MORE),), ((LOCATION, 1, MORE), (HUMAN, 1, MORE))),
    13: (((DESCRIPTION, 1, ONE),), ((ABBREVIATION, 1, MORE), (ENTITY, 1, MORE))),
    14: (((HUMAN, 1, MORE), (NUMERIC, 1, MORE)), ((LOCATION, 2, ONE),)),
    15: (((ENTITY, 1, MORE), (LOCATION, 1, MORE), (ABBREVIATION, 1, MORE)), ((NUMERIC, 1, ONE),)),
    16: (((DESCRIPTION, 1, MORE), (HUMAN, 1, MORE)), ((ENTITY, 2, MORE), (ABBREVIATION, 1, ONE))),
    17: (((NUMERIC, 1, ONE),), ((LOCATION, 1, MORE), (DESCRIPTION, 1, MORE))),
    18: (((ABBREVIATION, 1, MORE), (HUMAN, 1, ONE)), ((ENTITY, 1, MORE), (NUMERIC, 1, MORE))),
    19: (((LOCATION, 2, MORE), (ENTITY, 1, MORE)), ((DESCRIPTION, 1, ONE), (ABBREVIATION, 1, ONE))),
    20: (
        ((NUMERIC, 1, MORE), (HUMAN, 1, MORE)),
        ((LOCATION, 1, MORE), (ENTITY, 1, MORE), (ABBREVIATION, 1, ONE)),
    ),
}


class OolongPairs(Oolong):
    name = "oolong_pairs"
    tips = (
        "First label each line by its meaning, in numbered groups of about a hundred a sub-call, and check that each number "
        "came back. Then, in Python, group the labels by user and test the condition for each pair of users (itertools."
        "combinations). Do not ask a model for pairs. There can be thousands: build the answer in a variable."
    )
    per_context = 20  # the queries, in their order, about each window
    reply_tokens = 2048

    def __init__(self) -> None:
        super().__init__()

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        number, which = divmod(index, self.per_context)
        window, path, lines = self._window(length, seed, number, folder, ruler)
        pairs = pairs_of(window, which + 1)
        meta = {
            "length": length,
            "seed": seed,
            "index": index,
            "window": number,
            "lines": lines,
            "query": which + 1,
        }
        answer = [list(p) for p in sorted(pairs)]
        return Example(
            f"{self.name}-{length}-{seed}-{index}", path, ask(which + 1), answer, "", meta
        )

    def score(self, example: Example, reply: Any) -> float:
        """F1 over the set of pairs; two empty sets agree."""
        said, true = read_pairs(reply), {tuple(p) for p in example.answer}
        if not said or not true:
            return float(said == true)
        hits = len(said & true)
        return 2 * hits / (len(said) + len(true))


def read_pairs(reply: Any) -> set[tuple[int, int]]:
    """Pairs in a reply, the lower ID first; a list of two-element lists is taken as well."""
    if (
        isinstance(reply, list)
        and reply
        and all(isinstance(p, list | tuple) and len(p) == 2 for p in reply)
    ):
        reply = "\n".join(f"({a}, {b})" for a, b in reply)
    elif isinstance(reply, list):
        reply = "\n".join(map(str, reply))
    found = ((int(a), int(b)) for a, b in PAIR.findall(text_of(reply)))
    return {(min(p), max(p)) for p in found if p[0] != p[1]}


def ask(query: int) -> str:
    if query in EITHER:
        a, b, rule = EITHER[query]
        condition = f"both users have at least one question with label '{a}' or '{b}'"
        if rule:
            label, side, day = rule
            condition += f", and all questions with label '{label}' of both users are dated {side} {written(day)}"
    else:
        first, second = (" and ".join(_part(p) for p in parts) for parts in ACROSS[query])
        condition = f"one user has {first}, and the other user has {second}"
    return (
        f"List all pairs of user IDs (no duplicates, lower ID first) where {condition}. Judge the label of each question "
        "yourself. Write one pair a line in the form (id1, id2), and nothing else."
    )


def _part(part: tuple[str, int, bool]) -> str:
    label, n, exactly = part
    return (
        f"{'exactly' if exactly else 'at least'} {n} question{'s' * (n != 1)} with label '{label}'"
    )


def pairs_of(window: Window, query: int) -> set[tuple[int, int]]:
    users = sorted(window.of_user)
    if query in EITHER:
        fit = _fits_either(window, *EITHER[query])
        chosen = [u for u in users if fit(u)]
        return {(u, v) for i, u in enumerate(chosen) for v in chosen[i + 1 :]}
    first, second = (
        {u for u in users if _meets(window.of_user[u], parts)} for parts in ACROSS[query]
    )
    return {(min(u, v), max(u, v)) for u in first for v in second if u != v}


def _fits_either(
    window: Window, a: str, b: str, rule: tuple[str, str, Day] | None
) -> Callable[[int], bool]:
    out_of_time: set[int] = set()
    if rule:
        label, side, day = rule
        for item in window.items:
            if item.label == label and not (item.day > day if side == "after" else item.day < day):
                out_of_time.add(item.user)
    return lambda user: (
        bool(window.of_user[user][a] or window.of_user[user][b]) and user not in out_of_time
    )


def _meets(counts: Counter[str], parts: Part) -> bool:
    return all(counts[label] == n if exactly else counts[label] >= n for label, n, exactly in parts)
