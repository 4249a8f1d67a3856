"""A task's texts in made-up words: the banks that tasks draw from are for measuring, so training
never shows them."""

from __future__ import annotations

import random
import re

from rlm_runtime.tasks import words
from rlm_runtime.training.splits import word

BANK = sorted(
    {*words.ADJECTIVES, *words.NOUNS, *words.PLACES, *words.PEOPLE}, key=len, reverse=True
)
ANY = re.compile(r"\b(?:" + "|".join(BANK) + r")(?=s?\b)")


class Dressing:
    """The same made-up word for the same word of a bank, in every text of one sample."""

    def __init__(self, rng: random.Random, split: str):
        self._rng, self._split = rng, split
        self._words: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        return ANY.sub(self._word, text)

    def _word(self, match: re.Match[str]) -> str:
        old = match[0]
        if old not in self._words:
            new = word(self._rng, self._split)
            while new in self._words.values():
                new = word(self._rng, self._split)
            self._words[old] = new.capitalize() if old[0].isupper() else new
        return self._words[old]
