"""Items to be labelled, for training: other sentences and other label names than the ones that are
measured with.

Each family names the six kinds of `tasks.label_bank` in its own words; each kind has sentences of
its own. Families and sentences belong to a split by their place (every third is held out).
"""

from __future__ import annotations

import random

from rlm_runtime.tasks.label_bank import LABELS
from rlm_runtime.training.splits import code, of_split, word

# in the order of LABELS: description, entity, human, numeric, location, abbreviation
FAMILIES: tuple[tuple[str, ...], ...] = (
    ("explanation", "thing", "person", "amount", "place", "short form"),
    ("meaning", "object", "somebody", "figure", "site", "initials"),
    ("reason", "item", "individual", "quantity", "spot", "acronym"),
    ("K1 how and why", "K2 what", "K3 who", "K4 how many", "K5 where", "K6 letters"),
    ("a description", "some thing", "a human", "a numeral", "a locality", "a shortening"),
    ("account", "article", "name", "count", "region", "contraction"),
)
SENTENCES: dict[str, tuple[str, ...]] = dict(
    zip(
        LABELS,
        (
            (
                "Explain why the {a} {b} broke.",
                "How would one repair a {b}?",
                "Describe what makes a {b} {a}.",
                "Why do {b}s turn {a}?",
                "In what way does a {b} move?",
                "Tell me what {a} means.",
            ),
            (
                "Name the fruit that tastes of {b}.",
                "Which bird sits on the {b}?",
                "What fabric is the {a} {b}?",
                "Name a tool that opens a {b}.",
                "Which drink goes with {b}?",
                "What stone is the {b} cut from?",
            ),
            (
                "Name the author of {b}.",
                "Who owns the {a} {b}?",
                "Which king lost the {b}?",
                "Who painted {a}?",
                "Who repaired the {b}?",
                "Name the woman who found {b}.",
            ),
            (
                "How many days does {b} take?",
                "How heavy is the {a} {b}?",
                "Give the year of the {b}.",
                "How wide is a {b}?",
                "What does a {b} cost in coins?",
                "How often did the {b} ring?",
            ),
            (
                "Where did the {b} sink?",
                "In which town is the {a} {b}?",
                "Where can one buy a {b}?",
                "Which country lies behind {b}?",
                "Where does the {b} end?",
                "On which coast is {b}?",
            ),
            (
                "What is {c} in full?",
                "Write out {c}.",
                "What words hide behind {c}?",
                "Spell out the letters {c}.",
                "{c} is short for what?",
                "Which words does {c} abbreviate?",
            ),
        ),
        strict=True,
    )
)


def family(rng: random.Random, split: str) -> tuple[str, ...]:
    """Names for the six labels, in an order of their own."""
    return rng.choice(of_split(FAMILIES, split))


def sentence(rng: random.Random, split: str, label: str) -> str:
    """An item of this kind (one of LABELS)."""
    template = rng.choice(of_split(SENTENCES[label], split))
    letters = code(rng, split).upper()[:6]
    return template.format(a=word(rng, split), b=word(rng, split), c=letters)
