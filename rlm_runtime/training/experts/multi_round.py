"""Multi-round needles: build the request from the question, split the conversation by it, slice the
reply out."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

from rlm_runtime import tasks
from rlm_runtime.tasks.multi_round import ORDINALS
from rlm_runtime.training.dressing import Dressing
from rlm_runtime.training.expert import Expert, Problem, Say, Strategy, Turns, done, quoted
from rlm_runtime.training.splits import LETTERS, drawn, of_split

ASK = (
    "Give back, word for word, the assistant's {nth} {form} about {topic}. Put {prefix} directly in front of it.",
    "Repeat the {nth} {form} about {topic} that the assistant wrote, exactly, right behind {prefix}.",
    "What was the assistant's {nth} {form} about {topic}? Copy it, and begin with {prefix}.",
    "I need the {nth} {form} about {topic} again, letter by letter. Start with {prefix}, then the text.",
    "Quote the assistant's {nth} {form} about {topic} in full; {prefix} goes before it without a space.",
    "Print {prefix} and directly after it the {nth} {form} about {topic}, unchanged.",
)
REQUESTS = (
    "Write a {form} about {topic}.",
    "Please write me a {form} about {topic}.",
    "Now a {form} about {topic}, please.",
)
QUESTION = re.compile(r"the assistant's (\w+) (.+?) about (.+?) in the conversation\.")


def problem(spec: str, length: int, seed: int, index: int, split: str, folder: Path) -> Problem:
    task = tasks.get(spec)
    example = task.example(length, seed=seed, index=index, folder=folder)
    rng = random.Random(f"{spec} {seed} {index} {length} rounds")
    dress, request = Dressing(rng, split), rng.choice(of_split(REQUESTS, split))
    text = dress(example.context.read_text(encoding="utf-8"))
    text = re.sub(
        r"(?m)^User: Write a (.+) about (.+)\.$",
        lambda m: "User: " + request.format(form=m[1], topic=m[2]),
        text,
    )
    example.context.write_text(text, encoding="utf-8")
    nth, form, topic = QUESTION.search(dress(example.question)).groups()  # type: ignore[union-attr]
    prefix = drawn(rng, split, lambda r: "".join(r.choice(LETTERS) for _ in range(10)))
    ask = rng.choice(of_split(ASK, split))
    answer = prefix + dress(example.answer[len(example.meta["prefix"]) :])
    asked = ask.format(nth=nth, form=form, topic=topic, prefix=prefix)
    meta = {**example.meta, "prefix": prefix}
    example = dataclasses.replace(example, question=asked, answer=answer, meta=meta)
    facts = {"nth": ORDINALS.index(nth), "form": form, "topic": topic, "prefix": prefix}
    return Problem(
        task, example, split, lambda prompt: "not found", facts, template=f"{ask} | {request}"
    )


def _find(problem: Problem) -> str:
    """Lines that may be the request, with their numbers: its wording is not in the question."""
    words = f"{problem.facts['form']} about {problem.facts['topic']}"
    return (
        f'want = {quoted(words)}\nlines = context.split("\\n")\n'
        'hits = [i for i, l in enumerate(lines) if l.startswith("User:") and want in l]\n'
        "for i in hits[:2]:\n    print(i, lines[i])\nprint(len(hits))"
    )


def _request(problem: Problem, report: str) -> str:
    """The request as the printout shows it; a longer topic ("... at night") is another one."""
    words = f"{problem.facts['form']} about {problem.facts['topic']}"
    found = re.search(rf"User: (.*{re.escape(words)}(?:\.|, please\.))\n", report)
    assert found is not None, report
    return found[1]


def _slice(problem: Problem, request: str) -> str:
    line = quoted(f"User: {request}")
    return (
        f"hits = [i for i, l in enumerate(lines) if l == {line}]\n"
        f'text = lines[hits[{problem.facts["nth"]}] + 1].removeprefix("Assistant: ")'
    )


def slice_(problem: Problem, rng: random.Random) -> Turns:
    """Find the requests, take the reply behind the one asked for."""
    report = yield Say(_find(problem))
    prefix = quoted(str(problem.facts["prefix"]))
    yield Say(f"{_slice(problem, _request(problem, report))}\n{done(f'{prefix} + text')}")


def verify(problem: Problem, rng: random.Random) -> Turns:
    """The same, with a look at the beginning and the end of the slice."""
    report = yield Say(_find(problem))
    yield Say(
        f"{_slice(problem, _request(problem, report))}\nprint(len(hits), text[:40], text[-40:])"
    )
    prefix = quoted(str(problem.facts["prefix"]))
    yield Say(done(f"{prefix} + text"))


def recover(problem: Problem, rng: random.Random) -> Turns:
    """An index past the end first."""
    report = yield Say(_find(problem))
    request = _request(problem, report)
    yield Say(
        f"hits = [l for l in lines if l == {quoted('User: ' + request)}]\nprint(hits[99])",
        weight=0.0,
    )
    prefix = quoted(str(problem.facts["prefix"]))
    yield Say(f"{_slice(problem, request)}\n{done(f'{prefix} + text')}")


STRATEGIES = {"slice": Strategy(slice_), "verify": Strategy(verify), "recover": Strategy(recover)}
EXPERT = Expert(("multi_round", "multi_round_8"), problem, STRATEGIES)
