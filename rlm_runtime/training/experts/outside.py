"""Questions that a model trained on needles alone cannot answer: it says so, in its first turn."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from rlm_runtime import tasks
from rlm_runtime.training.dressing import Dressing
from rlm_runtime.training.expert import Expert, Problem, Say, Strategy, Turns, done, quoted
from rlm_runtime.training.splits import number, of_split, word

SORRY = "not in my competence"
ASK = (
    "Summarise the text.",
    "What is the text about?",
    "How many {a}s are there?",
    "Who is {A}?",
    "Why did the {a} {b}?",
    "Translate the text into {A}.",
    "Which of {A} and {B} is older?",
    "Write a poem about a {a}.",
    "How many lines are there?",
    "What happens to {A} at the end?",
    "Is {A} happy?",
    "Count the words that begin with {a}.",
    "What is {n} plus {m}?",
    "Compare {A} with {B}.",
    "Which label is the most frequent?",
    "Find the bug in the function {a}.",
    "What does {a}() return?",
    "List all people in the text.",
    "Explain the {a}.",
    "Give me a summary in {d} sentences.",
    "When was {A} born?",
    "Where does {A} live?",
    "Do you like {a}?",
    "Who are you?",
    "Hello!",
    "What is the capital of {A}?",
    "Sort the lines.",
    "Which user wrote the most?",
    "Fix the {a}.",
    "Continue the story.",
    "What do you think of {A}?",
    "Sum up part {d}.",
    "How often does {a} occur?",
    "Who said that {a} is {b}?",
    "In which year did {A} meet {B}?",
    "Rewrite part {d} in verse.",
    "Extract every date.",
    "What is the mood of the text?",
    "What should I cook with {a}?",
    "How do I get from {A} to {B}?",
    "Which pairs of users have both {a} and {b}?",
    "How does {a} work?",
    "Describe the {a} in the text.",
    "What was the main reason for {a}?",
    "Is it true that {a}s {b}?",
    "Tell me a story.",
    "Name three {a}s.",
    "Which file defines {a}?",
    "What did {A} do after that?",
    "Make a table of the {a}s.",
)
HEADS = ("", "", "Please: ", "I have a question. ", "Now then. ", "One thing: ")
TAILS = ("", "", " Be brief.", " Think first.", " Answer in one word.", " Use the text.")


def problem(spec: str, length: int, seed: int, index: int, split: str, folder: Path) -> Problem:
    """A text of the needle tasks with a question of another kind."""
    rng = random.Random(f"{spec} {seed} {index} {length} outside")
    task = tasks.get(rng.choice(("s_niah", "s_niah_essay", "niah_needles")))
    example = task.example(length, seed=seed, index=index, folder=folder)
    dress = Dressing(rng, split)
    example.context.write_text(dress(example.context.read_text(encoding="utf-8")), encoding="utf-8")
    ask = rng.choice(of_split(ASK, split))

    def name() -> str:
        return word(rng, split)

    question = ask.format(
        a=name(),
        b=word(rng, split),
        A=name().capitalize(),
        B=name().capitalize(),
        n=number(rng, split),
        m=number(rng, split),
        d=rng.randint(1, 90),
    )
    question = rng.choice(of_split(HEADS, split)) + question + rng.choice(of_split(TAILS, split))
    example = dataclasses.replace(example, question=question, answer=[SORRY], intro="")
    return Problem(task, example, split, lambda prompt: SORRY, {}, template=ask)


def decline(problem: Problem, rng: random.Random) -> Turns:
    yield Say(done(quoted(SORRY)))


EXPERT = Expert(("outside",), problem, {"decline": Strategy(decline)})
