"""Two worlds of words, phrasings and seeds that share nothing, so that what was trained on is not
what is measured.

A string belongs to one split by its hash, whoever draws it: nothing has to be stored, and no list
has to be kept apart.
"""

from __future__ import annotations

import random
import uuid
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from rlm_runtime.errors import UsageError
from rlm_runtime.training.english import any_word

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
SEEDS = 10**9  # seeds of training contexts begin here: above any that `rlm eval` is given
HELDOUT_SHARE = 4  # one string in so many is held out

ONSETS = [
    "b",
    "br",
    "c",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sk",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "z",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "oo", "ou"]
CODAS = ["", "", "b", "ck", "d", "l", "m", "n", "nd", "p", "r", "rt", "s", "st", "t", "x"]
LETTERS = "abcdefghijkmnpqrstuvwxyz23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
T = TypeVar("T")


def check_split(split: str) -> str:
    """Raises UsageError."""
    if split not in SPLITS:
        raise UsageError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}.")
    return split


def split_of(text: str) -> str:
    """The split a string belongs to; capital letters count as small ones."""
    return HELDOUT if zlib.crc32(text.lower().encode()) % HELDOUT_SHARE == 0 else TRAIN


def drawn(rng: random.Random, split: str, make: Callable[[random.Random], str]) -> str:
    """What `make` gives, drawn until it belongs to the split."""
    while split_of(text := make(rng)) != split:
        pass
    return text


def seed_of(seed: int, split: str) -> int:
    """The seed of a split's contexts: even for training, odd for the rest."""
    return SEEDS + 2 * seed + SPLITS.index(check_split(split))


def of_split(items: Sequence[T], split: str) -> Sequence[T]:
    """Every third phrasing is held out, the others are trained on."""
    return [item for i, item in enumerate(items) if (i % 3 == 2) == (split == HELDOUT)]


# -- strings that nobody can know by heart
def word(rng: random.Random, split: str) -> str:
    """A made-up word of two or three syllables."""

    def make(rng: random.Random) -> str:
        return "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
            for _ in range(rng.randint(2, 3))
        )

    return drawn(rng, split, make)


def phrase(rng: random.Random, split: str) -> str:
    return f"{word(rng, split)}-{word(rng, split)}"


def pair(rng: random.Random, split: str) -> str:
    """Two ordinary words with a hyphen between them."""
    return drawn(rng, split, lambda r: f"{any_word(r)}-{any_word(r)}")


def code(rng: random.Random, split: str) -> str:
    """Letters and digits, 6 to 16 of them."""
    return drawn(rng, split, lambda r: "".join(r.choice(LETTERS) for _ in range(r.randint(6, 16))))


def number(rng: random.Random, split: str) -> str:
    """5 to 9 digits."""
    return drawn(
        rng, split, lambda r: str(r.randint(10 ** (n := r.randint(4, 8)), 10 ** (n + 1) - 1))
    )


def identifier(rng: random.Random, split: str) -> str:
    return drawn(rng, split, lambda r: str(uuid.UUID(int=r.getrandbits(128), version=4)))


STRINGS: dict[str, Callable[[random.Random, str], str]] = {
    "words": phrase,
    "numbers": number,
    "uuids": identifier,
    "codes": code,
    "pairs": pair,
}
