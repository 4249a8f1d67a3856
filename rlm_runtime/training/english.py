"""Ordinary words, and phrasings with ordinary words in the place of their own.

A model that has seen few phrasings takes any other word of a question for its key. So the tokenizer
of small models knows the common words, and phrasings vary without end: a question is told apart by
its slots alone, the key by its spelling.
"""

from __future__ import annotations

import functools
import random
import re
from importlib import resources

CHANGED, ADDED = 0.3, 0.15  # share of the words replaced, and of the gaps filled
WORD = re.compile(r"(?<![\w{}])[A-Za-z]+(?![\w{}])")


@functools.cache
def common() -> tuple[str, ...]:
    """The most frequent words of prose and of Python's documentation, without those that tasks draw
    keys from (Austen, Moby-Dick, State of the Union addresses, the Brown corpus, pydoc)."""
    return tuple(resources.files(__package__).joinpath("common_words.txt").read_text().split())


def any_word(rng: random.Random) -> str:
    return rng.choice(common())


def saying(rng: random.Random, longest: int = 7) -> str:
    """Up to `longest` ordinary words that say nothing, as a sentence."""
    words = [any_word(rng) for _ in range(rng.randint(1, longest))]
    return " ".join(words).capitalize() + rng.choice((".", ".", "!", "?", ":"))


def blurred(rng: random.Random, template: str) -> str:
    """The template with some of its words replaced, and others put between them; its slots stay."""

    def word(match: re.Match[str]) -> str:
        old = match[0]
        new = any_word(rng) if rng.random() < CHANGED else old
        new = new.capitalize() if old[0].isupper() else new
        return f"{new} {any_word(rng)}" if rng.random() < ADDED else new

    return WORD.sub(word, template)
