"""Verbatim copy: look at how blocks are marked, then slice between the marks of the block that is
asked for."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

from rlm_runtime import tasks
from rlm_runtime.training.dressing import Dressing
from rlm_runtime.training.english import any_word, blurred
from rlm_runtime.training.expert import Expert, Problem, Say, Strategy, Turns, done, quoted
from rlm_runtime.training.splits import of_split

MARKS = (
    ("== part {n} ==", "== end of part {n} =="),
    ("[begin {n}]", "[end {n}]"),
    ("--- piece {n} ---", "--- /piece {n} ---"),
    ("<block {n}>", "</block {n}>"),
    ("#### section {n}", "#### close {n}"),
    ("~~ item {n} ~~", "~~ item {n} stops ~~"),
)
ASK = (
    "Copy {name} {n} exactly as it stands between its two marks, and nothing else.",
    "What stands between the marks of {name} {n}? Every character counts.",
    "Give back {name} {n} without its marker lines, unchanged.",
    "I need the text of {name} number {n}, character for character.",
    "Return {name} {n} verbatim.",
    "Between the two lines that mark {name} {n} there is a text. Repeat it.",
    "Repeat {name} {n} word for word.",
    "Give me {name} {n} as it is.",
    "Hand over all of {name} {n}, changing nothing.",
    "{name} {n}, please, exactly.",
    "Show me what {name} {n} says.",
    "Reproduce {name} {n}.",
    "Quote {name} {n} in full.",
    "Read me {name} {n}.",
    "Print the lines of {name} {n}.",
)
FENCES = (("=== ", " ==="), ("[", "]"), ("-- ", " --"), ("<", ">"), ("## ", ""), ("*** ", " ***"))
STOPS = ("end of ", "/", "end ", "close ", "after ", "no more ")
BLURRED = 0.5  # share of the marks, and of the questions, with other words in them
MARKED = re.compile(r"(?m)^===== (end of )?block (\d+) =====$")


def problem(spec: str, length: int, seed: int, index: int, split: str, folder: Path) -> Problem:
    task = tasks.get(spec)
    example = task.example(length, seed=seed, index=index, folder=folder)
    rng = random.Random(f"{spec} {seed} {index} {length} blocks")
    dress = Dressing(rng, split)
    begin, end = _marks(rng, split)
    text = dress(example.context.read_text(encoding="utf-8"))
    text = MARKED.sub(lambda m: (end if m[1] else begin).format(n=m[2]), text)
    example.context.write_text(text, encoding="utf-8")
    ask, name = rng.choice(of_split(ASK, split)), re.search(r"\w+", begin)[0]  # type: ignore[index]
    if rng.random() < BLURRED:
        ask = blurred(rng, ask)
    n = example.meta["block"]
    answer = text.split(begin.format(n=n) + "\n", 1)[1].split("\n" + end.format(n=n), 1)[0]
    example = dataclasses.replace(example, question=ask.format(n=n, name=name), answer=answer)
    facts = {"n": n, "begin": begin, "end": end}
    return Problem(
        task, example, split, lambda prompt: "not found", facts, template=f"{begin} | {ask}"
    )


def _marks(rng: random.Random, split: str) -> tuple[str, str]:
    """The lines before and behind a block, with {n} for its number."""
    if rng.random() > BLURRED:
        return rng.choice(of_split(MARKS, split))
    (left, right), stop, name = (
        rng.choice(of_split(FENCES, split)),
        rng.choice(of_split(STOPS, split)),
        any_word(rng),
    )
    return f"{left}{name} {{n}}{right}", f"{left}{stop}{name} {{n}}{right}"


def _look(problem: Problem) -> str:
    """The marks of the first block: how this text marks its blocks."""
    return (
        f'import re\nn = {quoted(str(problem.facts["n"]))}\nlines = context.split("\\n")\n'
        'marks = [l for l in lines if "1" in re.findall(r"\\d+", l) and len(l.split()) < 7]\n'
        'print("\\n".join(marks[:4]))'
    )


def _cut(problem: Problem) -> str:
    begin, end = (quoted(str(problem.facts[k]).format(n=1)) for k in ("begin", "end"))
    return (
        f'a = {begin}.replace("1", n)\nb = {end}.replace("1", n)\n'
        'i, j = lines.index(a), lines.index(b)\ntext = "\\n".join(lines[i + 1:j])'
    )


def slice_(problem: Problem, rng: random.Random) -> Turns:
    """Look at the marks, slice, hand in."""
    yield Say(_look(problem))
    yield Say(f"{_cut(problem)}\n{done('text')}")


def verify(problem: Problem, rng: random.Random) -> Turns:
    """The same, with the length and both ends of the slice printed first."""
    yield Say(_look(problem))
    yield Say(f"{_cut(problem)}\nprint(len(text), text[:30], text[-30:])")
    yield Say(done("text"))


def recover(problem: Problem, rng: random.Random) -> Turns:
    """A mark that is not there raises; the first line shows the right one."""
    begin = str(problem.facts["begin"]).split("{n}")
    yield Say(_look(problem))
    yield Say(f"print(lines.index({quoted(begin[0])} + n))", weight=0.0)
    yield Say(f"{_cut(problem)}\n{done('text')}")


STRATEGIES = {"slice": Strategy(slice_), "verify": Strategy(verify), "recover": Strategy(recover)}
EXPERT = Expert(("verbatim",), problem, STRATEGIES)
