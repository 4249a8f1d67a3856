"""OOLONG-style tasks: a long list of short items, each with a date and a user and a kind nobody
wrote down, and questions that can only be answered by judging every item. After OOLONG-synth
(Bertsch et al. 2025).

Not OOLONG itself: the items come from templates of our own (`label_bank.py`) instead of
classification data sets, so results compare with each other and not with published ones. What
follows OOLONG-synth: the number of lines for a length, the skew of the labels, users and dates, the
form of a line, intro and recall, the three groups of questions with 25 questions about each window,
the formats of the answers, and the score.
"""

from __future__ import annotations

import datetime
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.tasks.base import Example, Ruler, Task, text_of, writing
from rlm_runtime.tasks.label_bank import LABELS, question

FIRST_DAY, DAYS = datetime.date(2021, 9, 1), 1217  # 40 months
FEW = 5  # questions that do not fit a window are drawn again this often, times the number wanted
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
COMPARISONS = ("more common than", "less common than", "same frequency as")


@dataclass(frozen=True)
class Item:
    day: datetime.date
    user: int
    label: str


class Window:
    """The items of one context. Their texts are made anew whenever the context is written."""

    def __init__(self, rng: random.Random, lines: int):
        temperature = rng.randint(2, 6)
        logits = [rng.uniform(0, 10) / temperature for _ in LABELS]
        weights = [math.exp(x - max(logits)) for x in logits]
        users = rng.sample(range(10_000, 100_000), max(5, min(20_000, round(2 * math.sqrt(lines)))))
        # a fifth of the users write four fifths of the lines
        busy = users[: max(1, len(users) // 5)]
        rest = users[len(busy) :] or busy
        self.items = []
        for label in rng.choices(LABELS, weights, k=lines):
            user = rng.choice(busy if rng.random() < 0.8 else rest)
            self.items.append(
                Item(FIRST_DAY + datetime.timedelta(days=rng.randrange(DAYS)), user, label)
            )
        self.labels = Counter(i.label for i in self.items)
        self.users = Counter(i.user for i in self.items)
        self.days = Counter(i.day for i in self.items)
        self.of_user: dict[int, Counter[str]] = {}
        for item in self.items:
            self.of_user.setdefault(item.user, Counter())[item.label] += 1

    def texts(self, rng: random.Random) -> Iterator[str]:
        return (question(rng, item.label) for item in self.items)


@dataclass(frozen=True)
class Question:
    group: str  # counting | user | timeline
    kind: str
    text: str
    answer: str
    type: str  # label | number | user | date | comparison | month


class Oolong(Task):
    """Knobs: `labelled`: the kind stands at the end of each line (then code alone can answer);
    `group`: questions of one group only."""

    name = "oolong"
    tips = (
        "Each line is one item with a date, a user and a text; parse date and user with Python. The label is written only "
        "in a labelled version: else send the lines to sub-calls in numbered groups of about a hundred, ask for one label "
        "a number from the list in the question, and check that each number came back. Count and compare in Python, over "
        "the items that the question's dates and users leave."
    )
    per_context = 25
    reply_tokens = 250

    def __init__(self, *, labelled: bool = False, group: str | None = None):
        if group not in (None, *GROUPS):
            raise UsageError(f"{self.name}: group={group!r}; expected one of {', '.join(GROUPS)}.")
        self.labelled, self.group = bool(labelled), group

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        number, which = divmod(index, self.per_context)
        window, path, lines = self._window(length, seed, number, folder, ruler)
        asked = self._questions(window, length, seed, number)[which]
        meta = {
            "length": length,
            "seed": seed,
            "index": index,
            "window": number,
            "lines": lines,
            "group": asked.group,
            "kind": asked.kind,
            "answer_type": asked.type,
        }
        return Example(
            f"{self.name}-{length}-{seed}-{index}", path, asked.text, asked.answer, "", meta
        )

    def score(self, example: Example, reply: Any) -> float:
        return oolong_score(example.answer, example.meta["answer_type"], text_of(reply))

    def _window(
        self, length: int, seed: int, number: int, folder: Path, ruler: Ruler
    ) -> tuple[Window, Path, int]:
        """The window and its file, written unless it is there whole."""
        rng = self.rng(seed, number, "sizes")
        probe = [Item(FIRST_DAY, 12345, label) for label in LABELS] * 30
        each = sum(ruler(self._line(item, question(rng, item.label))) for item in probe) / len(
            probe
        )
        prompt = ruler(self._intro(9999)) + ruler(self._recall(9999))
        lines = math.floor((0.95 * length - prompt - 250) / each)
        if lines < 8:
            raise self.too_short(length, (8 * each + prompt + 250) / 0.95)
        key = (length, seed, number)
        window = Window(self.rng(*key), lines)
        path = self.file(folder, length, seed, number * self.per_context)
        if not path.exists():
            with writing(path) as file:
                file.write(self._intro(lines) + "\n\n")
                for item, text in zip(
                    window.items, window.texts(self.rng(*key, "texts")), strict=True
                ):
                    file.write(self._line(item, text))
                file.write("\n" + self._recall(lines) + "\n")
        return window, path, lines

    def _questions(self, window: Window, length: int, seed: int, number: int) -> list[Question]:
        rng = self.rng(length, seed, number, "questions")
        makers = [
            m for group, makers in GROUPS.items() if self.group in (None, group) for m in makers
        ]
        out: list[Question] = []
        seen: set[str] = set()
        for _ in range(FEW * self.per_context * 4):
            made = rng.choice(makers)(rng, window)
            if made is not None and (made.text not in seen or len(makers) < 3):
                seen.add(made.text)
                out.append(made)
            if len(out) == self.per_context:
                break
        while len(out) < self.per_context:  # a small window has few questions with a clear answer
            out.append(out[len(out) % len(seen)] if out else _count(rng, window))
        return out

    def _line(self, item: Item, text: str) -> str:
        label = f" || Label: {item.label}" if self.labelled else ""
        return f"Date: {written(item.day)} || User: {item.user} || Instance: {text}{label}\n"

    def _intro(self, lines: int) -> str:
        kinds = ", ".join(f"'{label}'" for label in LABELS)
        tail = (
            ""
            if self.labelled
            else " The labels are not given: you have to judge each question yourself."
        )
        return (
            f"The following lines hold {lines} general-knowledge questions, one a line, each with a date and the ID of the "
            f"user who asked it. Every question has one of 6 labels, by what it asks for: {kinds}.{tail}"
        )

    def _recall(self, lines: int) -> str:
        kinds = ", ".join(f"'{label}'" for label in LABELS)
        return f"Recall: the {lines} lines above hold general-knowledge questions, each of which has one of the labels {kinds}."


def written(day: datetime.date) -> str:
    """Jan 06, 2023, in every locale."""
    return f"{MONTHS[day.month - 1]} {day.day:02d}, {day.year}"


def parse_date(text: str) -> datetime.date | None:
    text = text.strip().rstrip(".")
    named = re.fullmatch(r"([A-Za-z]{3})[a-z]*\.? (\d{1,2})(?:st|nd|rd|th)?,? (\d{4})", text)
    reversed_ = re.fullmatch(r"(\d{1,2})(?:st|nd|rd|th)? ([A-Za-z]{3})[a-z]*\.?,? (\d{4})", text)
    plain = re.fullmatch(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ].*)?", text)
    american = re.fullmatch(r"(\d{1,2})/(\d{1,2})/(\d{4})", text)
    try:
        if named:
            return datetime.date(int(named[3]), MONTHS.index(named[1].title()) + 1, int(named[2]))
        if reversed_:
            return datetime.date(
                int(reversed_[3]), MONTHS.index(reversed_[2].title()) + 1, int(reversed_[1])
            )
        if plain:
            return datetime.date(int(plain[1]), int(plain[2]), int(plain[3]))
        if american:
            return datetime.date(int(american[3]), int(american[1]), int(american[2]))
    except ValueError:
        return None
    return None


def oolong_score(answer: str, kind: str, reply: str) -> float:
    """What stands behind the last colon, without `*`, `[`, `]` and spaces around it: exactly the
    answer scores 1; a comparison by containment; a number 0.75 to the power of the error; a date by
    its day; anything else 0."""
    said = re.sub(r"[*\[\]]", "", reply.rsplit(":", 1)[-1]).strip()
    if said == answer:
        return 1.0
    if kind == "comparison":
        # "more common", without "than"
        named = {c for c in COMPARISONS if c.rsplit(" ", 1)[0] in said}
        return float(named == {answer})
    if kind == "number":
        found = re.fullmatch(r"-?\d[\d,]*(?:\.\d+)?", said)
        return 0.75 ** abs(int(answer) - float(said.replace(",", ""))) if found else 0.0
    if kind == "date":
        day = parse_date(said)
        return float(day is not None and day == parse_date(answer))
    return 0.0


# -- questions. Each maker returns None where the window has no clear answer.


def _unique(
    counts: Counter[Any], rng: random.Random, least: bool = False, rank: int = 0, gap: float = 0.0
) -> Any | None:
    """The key at a rank, if its neighbours differ from it by more than `gap` of it."""
    ordered = sorted(counts.items(), key=lambda kv: (kv[1] if least else -kv[1], str(kv[0])))
    if len(ordered) < rank + 2:
        return None
    key, n = ordered[rank]
    beside = [ordered[i][1] for i in (rank - 1, rank + 1) if i >= 0]
    return key if all(abs(n - other) > gap * max(n, other) for other in beside) else None


def _most(rng: random.Random, w: Window) -> Question | None:
    key = _unique(w.labels, rng, gap=0.02)
    text = "Which of the labels is the most common one? Answer in the form 'Label: answer', with one of the labels."
    return key and Question("counting", "most", text, key, "label")


def _least(rng: random.Random, w: Window) -> Question | None:
    key = _unique(w.labels, rng, least=True, gap=0.02)
    text = "Which of the labels that occur is the least common one? Answer in the form 'Label: answer', with one of the labels."
    return key and Question("counting", "least", text, key, "label")


def _compare(rng: random.Random, w: Window) -> Question:
    a, b = rng.sample(LABELS, 2)
    return Question(
        "counting",
        "compare",
        _comparison(a, b, "among all the questions"),
        _outcome(w.labels[a], w.labels[b]),
        "comparison",
    )


def _comparison(a: str, b: str, where: str) -> str:
    return (
        f"Is label '{a}' more common, less common, or the same frequency as label '{b}' {where}? Answer in the form "
        f"'Answer: {a} is [X] {b}', where [X] is 'more common than', 'less common than' or 'same frequency as'; write [X] alone "
        "behind the colon if you like."
    )


def _outcome(a: int, b: int) -> str:
    return COMPARISONS[0] if a > b else COMPARISONS[1] if a < b else COMPARISONS[2]


def _count(rng: random.Random, w: Window) -> Question:
    a = rng.choice(LABELS)
    text = f"How many of the questions have label '{a}'? Answer in the form 'Answer: number'."
    return Question("counting", "count", text, str(w.labels[a]), "number")


def _user_most(rng: random.Random, w: Window) -> Question | None:
    rank = rng.randrange(2)
    key = _unique(w.users, rng, rank=rank)
    text = f"Which user asked the {'most' if rank == 0 else 'second most'} questions? Answer in the form 'User: ID'."
    return key and Question(
        "user", "most_user" if rank == 0 else "second_user", text, str(key), "user"
    )


def _user_of_label(rng: random.Random, w: Window) -> Question | None:
    a = rng.choice(LABELS)
    key = _unique(Counter({u: c[a] for u, c in w.of_user.items() if c[a]}), rng)
    text = f"Which user asked the most questions with label '{a}'? Answer in the form 'User: ID'."
    return key and Question("user", "user_of_label", text, str(key), "user")


def _user_compare(rng: random.Random, w: Window) -> Question | None:
    user = rng.choice(list(w.users))
    a, b = rng.sample(LABELS, 2)
    counts = w.of_user[user]
    if abs(counts[a] - counts[b]) < 2:
        return None
    where = f"among the questions of user {user}"
    return Question(
        "user",
        "user_compare",
        _comparison(a, b, where),
        _outcome(counts[a], counts[b]),
        "comparison",
    )


def _user_subset(rng: random.Random, w: Window) -> Question | None:
    users = sorted(rng.sample(list(w.users), min(len(w.users), rng.randint(3, 5))))
    a = rng.choice(LABELS)
    listed = ", ".join(map(str, users))
    text = f"Of the questions asked by the users {listed}, how many have label '{a}'? Answer in the form 'Answer: number'."
    return Question("user", "user_subset", text, str(sum(w.of_user[u][a] for u in users)), "number")


def _day_most(rng: random.Random, w: Window) -> Question | None:
    key = _unique(w.days, rng)
    text = "On which date were the most questions asked? Answer in the form 'Date: Mon DD, YYYY', such as 'Date: Jan 06, 2023'."
    return key and Question("timeline", "day_most", text, written(key), "date")


def _days_with(rng: random.Random, w: Window) -> Question:
    n = rng.choice(sorted(set(w.days.values())))
    text = f"How many dates have exactly {n} question{'s' * (n != 1)}? Answer in the form 'Answer: number'."
    return Question(
        "timeline", "days_with", text, str(sum(c == n for c in w.days.values())), "number"
    )


def _before_after(rng: random.Random, w: Window) -> Question | None:
    day = FIRST_DAY + datetime.timedelta(days=rng.randrange(DAYS // 4, 3 * DAYS // 4))
    after, a = rng.random() < 0.5, rng.choice(LABELS)
    count = sum(i.label == a and (i.day > day if after else i.day < day) for i in w.items)
    side = "after" if after else "before"
    text = f"How many of the questions dated {side} {written(day)} have label '{a}'? Answer in the form 'Answer: number'."
    return Question("timeline", "before_after", text, str(count), "number")


def _month_subset(rng: random.Random, w: Window) -> Question | None:
    first = rng.randrange(12)
    chosen = sorted({(first + k) % 12 for k in range(rng.randint(1, 3))})
    counts = Counter(i.label for i in w.items if i.day.month - 1 in chosen)
    key = _unique(counts, rng, gap=0.02)
    listed = ", ".join(MONTHS[m] for m in chosen)
    text = (
        f"Among the questions dated in these months, of any year: {listed}, which label is the most common one? Answer in the "
        "form 'Label: answer', with one of the labels."
    )
    return key and Question("timeline", "month_subset", text, key, "label")


def _range_subset(rng: random.Random, w: Window) -> Question | None:
    begin = FIRST_DAY + datetime.timedelta(days=rng.randrange(DAYS // 2))
    end = begin + datetime.timedelta(days=rng.randrange(60, DAYS // 2))
    a, b = rng.sample(LABELS, 2)
    counts = Counter(i.label for i in w.items if begin <= i.day <= end)
    where = f"among the questions dated from {written(begin)} to {written(end)}, both included"
    return Question(
        "timeline",
        "range_subset",
        _comparison(a, b, where),
        _outcome(counts[a], counts[b]),
        "comparison",
    )


def _months_more(rng: random.Random, w: Window) -> Question:
    a, b = rng.sample(LABELS, 2)
    months: dict[tuple[int, int], Counter[str]] = {}
    for item in w.items:
        months.setdefault((item.day.year, item.day.month), Counter())[item.label] += 1
    count = sum(c[a] > c[b] for c in months.values())
    text = (
        f"In how many months (a month of one year is a month) are there more questions with label '{a}' than with label '{b}'? "
        "Answer in the form 'Answer: number'."
    )
    return Question("timeline", "months_more", text, str(count), "number")


Maker = Callable[[random.Random, Window], "Question | None"]
GROUPS: dict[str, tuple[Maker, ...]] = {
    "counting": (_most, _least, _compare, _count),
    "user": (_user_most, _user_of_label, _user_compare, _user_subset),
    "timeline": (_day_most, _days_with, _before_after, _month_subset, _range_subset, _months_more),
}
