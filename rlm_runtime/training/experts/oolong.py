"""OOLONG-style questions: parse the lines, get a label for each, count in Python.

Where the labels are not written, the lines go to the sub-model in small numbered groups (map), and
the counting is the same code as where they are (reduce). The label names and the items are of the
split, never those of the task.
"""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

from rlm_runtime import tasks
from rlm_runtime.tasks.label_bank import LABELS, TEMPLATES
from rlm_runtime.training import items
from rlm_runtime.training.expert import Expert, Problem, Say, Strategy, Turns, done, quoted
from rlm_runtime.training.splits import of_split

WRAP = (
    "{q}",
    "Here is my question. {q}",
    "{q} Be exact.",
    "Count carefully. {q}",
    "From the list: {q}",
    "{q} Check twice.",
    "Please help. {q}",
    "About the lines in the text: {q}",
    "One question. {q}",
)
LINE = re.compile(r"(?m)^(Date: .{12} \|\| User: \d{5} \|\| Instance: )(.*?)( \|\| Label: (.*))?$")
GROUP = 10  # lines of a sub-call: about 300 tokens
FIELD = re.compile(r"\{\w+\}")
KNOWN = [
    (label, re.compile(FIELD.sub(r".+", re.sub(r"([?.])", r"\\\1", template))))
    for label, templates in TEMPLATES.items()
    for template in templates
]


def label_of(text: str) -> str:
    """The kind of an item of the task's own bank: that of the longest template that fits."""
    fitting = [(len(pattern.pattern), label) for label, pattern in KNOWN if pattern.fullmatch(text)]
    return max(fitting)[1]


def problem(spec: str, length: int, seed: int, index: int, split: str, folder: Path) -> Problem:
    task = tasks.get(spec)
    example = task.example(length, seed=seed, index=index, folder=folder)
    rng = random.Random(f"{spec} {seed} {index} {length} items")
    names = dict(zip(LABELS, items.family(rng, split), strict=True))
    truth: dict[str, str] = {}

    def item(match: re.Match[str]) -> str:
        label = match[4] or label_of(match[2])
        text = items.sentence(rng, split, label)
        while truth.get(text, names[label]) != names[label]:
            text = items.sentence(rng, split, label)
        truth[text] = names[label]
        return match[1] + text + (f" || Label: {names[label]}" if match[4] else "")

    def renamed(text: str) -> str:
        return re.sub(
            r"'(" + "|".join(map(re.escape, LABELS)) + r")'", lambda m: f"'{names[m[1]]}'", text
        )

    text = renamed(LINE.sub(item, example.context.read_text(encoding="utf-8")))
    # a window is shared by many questions
    path = example.context.with_name(f"{example.context.stem}-{index}.txt")
    path.write_text(text, encoding="utf-8")
    question = renamed(example.question)
    # the form of a comparison's answer repeats the labels without quotes
    for label, name in names.items():
        question = question.replace(f"{label} is [X]", f"{name} is [X]").replace(
            f"[X] {label}'", f"[X] {name}'"
        )
    wrap = rng.choice(of_split(WRAP, split))
    answer = (
        names.get(example.answer, example.answer)
        if isinstance(example.answer, str)
        else example.answer
    )
    example = dataclasses.replace(
        example, context=path, question=wrap.format(q=question), answer=answer
    )

    def sub(prompt: str) -> str:
        lines = prompt.split("\n")[1:]
        return "\n".join(truth.get(line, "unknown") for line in lines)

    template = f"{' / '.join(names.values())} | {wrap}"
    return Problem(
        task, example, split, sub, {"labelled": " || Label: " in text}, template=template
    )


# -- turns that all strategies share
LOOK = "print(context[:500])"
ROWS = (
    'rows = [dict(p.split(": ", 1) for p in l.split(" || ")) for l in context.split("\\n") if l.startswith("Date: ")]\n'
    "print(len(rows), rows[0])"
)
MAP = (
    'import re\nlabels = re.findall(r"\'(.+?)\'", context.split("\\n")[0])\n'
    'ask = "Label each line, one label a line: " + "; ".join(labels)\n'
    f"groups = [rows[i:i + {GROUP}] for i in range(0, len(rows), {GROUP})]\n"
    'replies = llm_batch([ask + "\\n" + "\\n".join(r["Instance"] for r in g) for g in groups])\n'
    'for g, t in zip(groups, replies):\n    for r, x in zip(g, t.split("\\n")):\n        r["Label"] = x\n'
    'print(sum(r.get("Label") in labels for r in rows), "of", len(rows))'
)


def begin(problem: Problem, *, look: bool = True) -> Turns:
    """Look at the text, read its lines as rows, get a label for each."""
    if look:
        yield Say(LOOK)
    yield Say(ROWS)
    if not problem.facts["labelled"]:
        yield Say(MAP)


def _code(problem: Problem) -> str:
    """Code that binds `found`, from the question's kind; every name and number in it stands in the
    question."""
    kind, q = problem.example.meta["kind"], problem.example.question
    labels = [quoted(name) for name in re.findall(r"label '(.+?)'", q)]
    a, b = (*labels, "", "")[:2]
    count = "from collections import Counter\n"
    date = 'from datetime import datetime\nday = lambda t: datetime.strptime(t, "%b %d, %Y")\n'
    verdict = (
        f"x, y = c[{a}], c[{b}]\n"
        'found = "more common than" if x > y else "less common than" if x < y else "same frequency as"'
    )

    def of_label(where: str) -> str:
        return f'{count}c = Counter(r["Label"] for r in rows{where})\n'

    if kind in ("most", "least"):
        return of_label("") + f"found = c.most_common()[{0 if kind == 'most' else -1}][0]"
    if kind == "compare":
        return of_label("") + verdict
    if kind == "count":
        return f'found = sum(r["Label"] == {a} for r in rows)'
    if kind in ("most_user", "second_user"):
        return f'{count}c = Counter(r["User"] for r in rows)\nfound = c.most_common()[{int(kind == "second_user")}][0]'
    if kind == "user_of_label":
        return f'{count}c = Counter(r["User"] for r in rows if r["Label"] == {a})\nfound = c.most_common()[0][0]'
    if kind == "user_compare":
        user = re.search(r"of user (\d+)", q)[1]  # type: ignore[index]
        return of_label(f' if r["User"] == "{user}"') + verdict
    if kind == "user_subset":
        users = re.findall(r"\d{5}", q)
        return f'users = [{", ".join(map(quoted, users))}]\nfound = sum(r["Label"] == {a} for r in rows if r["User"] in users)'
    if kind == "day_most":
        return f'{count}c = Counter(r["Date"] for r in rows)\nfound = c.most_common()[0][0]'
    if kind == "days_with":
        n = re.search(r"exactly (\d+)", q)[1]  # type: ignore[index]
        return f'{count}c = Counter(r["Date"] for r in rows)\nfound = sum(v == {n} for v in c.values())'
    if kind == "before_after":
        side, day = re.search(r"dated (before|after) (\w{3} \d\d, \d{4})", q).groups()  # type: ignore[union-attr]
        sign = ">" if side == "after" else "<"
        return f'{date}found = sum(r["Label"] == {a} for r in rows if day(r["Date"]) {sign} day("{day}"))'
    if kind == "month_subset":
        months = re.search(r"of any year: ([\w, ]+?), which", q)[1].split(", ")  # type: ignore[index]
        return (
            of_label(f' if r["Date"][:3] in [{", ".join(map(quoted, months))}]')
            + "found = c.most_common()[0][0]"
        )
    if kind == "range_subset":
        first, last = re.search(r"from (\w{3} \d\d, \d{4}) to (\w{3} \d\d, \d{4})", q).groups()  # type: ignore[union-attr]
        return date + of_label(f' if day("{first}") <= day(r["Date"]) <= day("{last}")') + verdict
    assert kind == "months_more", kind
    return (
        f'{count}c = Counter((r["Date"][:3], r["Date"][-4:], r["Label"]) for r in rows)\n'
        f'months = {{(r["Date"][:3], r["Date"][-4:]) for r in rows}}\nfound = sum(c[(*m, {a})] > c[(*m, {b})] for m in months)'
    )


def count(problem: Problem, rng: random.Random) -> Turns:
    """Rows, labels, then one computation."""
    yield from begin(problem)
    yield Say(f"{_code(problem)}\n{done('str(found)')}")


def verify(problem: Problem, rng: random.Random) -> Turns:
    """The same, with the result printed first."""
    yield from begin(problem)
    yield Say(f"{_code(problem)}\nprint(found)")
    yield Say(done("str(found)"))


def recover(problem: Problem, rng: random.Random) -> Turns:
    """Lines that are none of the items do not parse."""
    yield Say(LOOK)
    yield Say(
        'rows = [dict(p.split(": ", 1) for p in l.split(" || ")) for l in context.split("\\n")]',
        weight=0.0,
    )
    yield from begin(problem, look=False)
    yield Say(f"{_code(problem)}\n{done('str(found)')}")


EXPERT = Expert(
    ("oolong", "oolong_labelled"),
    problem,
    {"count": Strategy(count), "verify": Strategy(verify), "recover": Strategy(recover)},
)
