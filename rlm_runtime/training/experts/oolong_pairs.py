"""OOLONG-Pairs-style questions: labels by the sub-model, then the condition for each user in
Python, and all pairs."""

from __future__ import annotations

import random
import re

from rlm_runtime.training.expert import Expert, Problem, Say, Strategy, Turns, done, quoted
from rlm_runtime.training.experts import oolong

USERS = (
    "from collections import Counter\nfrom itertools import combinations\nusers = {}\n"
    'for r in rows:\n    users.setdefault(r["User"], Counter())[r["Label"]] += 1\n'
)
PART = re.compile(r"(exactly|at least) (\d+) questions? with label '(.+?)'")


def _condition(text: str) -> str:
    return " and ".join(
        f"c[{quoted(label)}] {'==' if how == 'exactly' else '>='} {n}"
        for how, n, label in PART.findall(text)
    )


def _code(problem: Problem) -> str:
    """Code that binds `pairs`, a list of lines."""
    q = problem.example.question
    if across := re.search(r"one user has (.+?), and the other user has (.+?)\. Judge", q):
        first, second = (_condition(part) for part in across.groups())
        return (
            f"{USERS}one = [u for u, c in users.items() if {first}]\ntwo = [u for u, c in users.items() if {second}]\n"
            'pairs = {f"({min(u, v)}, {max(u, v)})" for u in one for v in two if u != v}'
        )
    a, b = re.search(r"label '(.+?)' or '(.+?)'", q).groups()  # type: ignore[union-attr]
    code, rule = USERS, ""
    if dated := re.search(
        r"all questions with label '(.+?)' of both users are dated (before|after) (\w{3} \d\d, \d{4})",
        q,
    ):
        label, side, day = dated.groups()
        sign = "<=" if side == "after" else ">="
        code += (
            'from datetime import datetime\nday = lambda t: datetime.strptime(t, "%b %d, %Y")\n'
            f'bad = {{r["User"] for r in rows if r["Label"] == {quoted(label)} and day(r["Date"]) {sign} day("{day}")}}\n'
        )
        rule = " and u not in bad"
    return (
        f"{code}ok = sorted(u for u, c in users.items() if (c[{quoted(a)}] or c[{quoted(b)}]){rule})\n"
        'pairs = [f"({u}, {v})" for u, v in combinations(ok, 2)]'
    )


ANSWER = '"\\n".join(sorted(pairs))'


def pairs(problem: Problem, rng: random.Random) -> Turns:
    """Rows, labels, pairs."""
    yield from oolong.begin(problem)
    yield Say(f"{_code(problem)}\n{done(ANSWER)}")


def verify(problem: Problem, rng: random.Random) -> Turns:
    """The same, with the number of pairs printed first."""
    yield from oolong.begin(problem)
    yield Say(f"{_code(problem)}\nprint(len(pairs), len(users))")
    yield Say(done(ANSWER))


EXPERT = Expert(
    ("oolong_pairs",), oolong.problem, {"pairs": Strategy(pairs), "verify": Strategy(verify)}
)
