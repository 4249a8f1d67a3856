"""Sub-model samples without a run: a snippet and a question, answered with a value, a label, yes or
no, or a quotation.

They have the form of a plain sub-call (one user message), and everything in a reply stands in its
prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from rlm_runtime.tasks.label_bank import LABELS
from rlm_runtime.training import items
from rlm_runtime.training.experts.needles import KINDS, ONE, SENTENCES
from rlm_runtime.training.samples import Conversation, spoken
from rlm_runtime.training.splits import STRINGS, code, of_split, phrase, seed_of, word

YES = ("Does the text mention {x}?", "Is {x} named in the text?", "Can {x} be found below?")
QUOTE = (
    "Quote the sentence about {x}.",
    "Which sentence names {x}? Give it whole.",
    "Copy the sentence with {x}.",
)
FILLER = ("The {a} was {b} again.", "Nobody in {a} saw the {b}.", "A {a} came before the {b}.")
FORM = {"yes": " Yes or no.", "value": " Reply with it alone."}


def _filler(rng: random.Random, split: str) -> str:
    return rng.choice(of_split(FILLER, split)).format(a=word(rng, split), b=word(rng, split))


def _snippet(rng: random.Random, split: str, *sentences: str) -> str:
    lines = [*sentences, *(_filler(rng, split) for _ in range(rng.randint(1, 5)))]
    rng.shuffle(lines)
    return rng.choice((" ", "\n")).join(lines)


def _needle(rng: random.Random, split: str) -> tuple[str, str, str, str]:
    kind, key = (
        rng.choice(of_split(KINDS, split)),
        STRINGS[rng.choice(("words", "codes"))](rng, split),
    )
    value = STRINGS[rng.choice(sorted(STRINGS))](rng, split)
    return (
        kind,
        key,
        value,
        rng.choice(of_split(SENTENCES, split)).format(kind=kind, key=key, value=value),
    )


def value(rng: random.Random, split: str) -> tuple[str, str]:
    kind, key, found, line = _needle(rng, split)
    _, _, _, other = _needle(rng, split)
    ask = rng.choice(of_split(ONE, split)).format(kind=kind, key=key) + FORM["value"]
    if rng.random() < 0.2:  # asked about what is not there
        return f"{ask}\n{_snippet(rng, split, other)}", "not found"
    return f"{ask}\n{_snippet(rng, split, line, other)}", found


def label(rng: random.Random, split: str) -> tuple[str, str]:
    names = dict(zip(LABELS, items.family(rng, split), strict=True))
    true = [rng.choice(LABELS) for _ in range(rng.randint(1, 10))]
    listed = rng.sample(sorted(names.values()), len(names))
    lines = [items.sentence(rng, split, t) for t in true]
    ask = "Label each line, one label a line: " + "; ".join(listed)
    return "\n".join([ask, *lines]), "\n".join(names[t] for t in true)


def yes_no(rng: random.Random, split: str) -> tuple[str, str]:
    name, there = rng.choice((phrase, code))(rng, split), rng.random() < 0.5
    sentence = rng.choice(of_split(FILLER, split)).format(a=name, b=word(rng, split))
    ask = rng.choice(of_split(YES, split)).format(x=name) + FORM["yes"]
    return (
        f"{ask}\n{_snippet(rng, split, *([sentence] if there else []))}",
        "yes" if there else "no",
    )


def quote(rng: random.Random, split: str) -> tuple[str, str]:
    _, key, _, line = _needle(rng, split)
    return f"{rng.choice(of_split(QUOTE, split)).format(x=key)}\n{_snippet(rng, split, line)}", line


MAKERS: dict[str, Callable[[random.Random, str], tuple[str, str]]] = {
    "value": value,
    "label": label,
    "yes_no": yes_no,
    "quote": quote,
}


def samples(count: int, seed: int, split: str) -> Iterator[Conversation]:
    """`count` samples, the kinds in turn."""
    for i in range(count):
        name = list(MAKERS)[i % len(MAKERS)]
        prompt, reply = MAKERS[name](random.Random(f"reading {seed_of(seed, split)} {i}"), split)
        provenance = {
            "source": "reading",
            "kind": name,
            "split": split,
            "seed": seed,
            "index": i,
            "role": "sub",
        }
        yield Conversation((spoken("user", prompt), spoken("assistant", reply)), provenance)
