"""Exercises in copying: random strings to be said again in another order, as dense as they can be.

To copy is most of what a small model trained from scratch has to learn: in conversations alone too
few of the tokens are copied for it to begin. Strings are quoted in the reply, as in the code that
names a key.

`drills` are where it begins: one string of random characters, then its pieces, with a loss on what
can be known alone. A loss on anything else, the first characters of a piece or what ends it, puts
the beginning off for longer than a million tokens (docs/native.md).
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from functools import partial

from rlm_runtime.training.english import any_word, saying
from rlm_runtime.training.experts.needles import KINDS, LAST, MANY, ONE, SENTENCES, phrased
from rlm_runtime.training.samples import Conversation, spoken
from rlm_runtime.training.splits import STRINGS, drawn, of_split, seed_of, word

ROOM = 110  # characters of strings in an exercise, about
DRILL = 56  # characters of a drill
PIECES = (6, 12)  # characters of one of its pieces
# Alphabets, and the number of characters that tell what piece it is. In a small one the same few
# characters come again and again, so that a copy has to look at more of them: UUIDs and numbers.
ALPHABETS = (
    (string.ascii_letters + string.digits + "-", 2),
    (string.ascii_letters + string.digits + "-", 2),
    (string.hexdigits[:16], 4),
    (string.digits, 5),
)


def _drawn(rng: random.Random, split: str) -> str:
    return STRINGS[rng.choice(("words", "pairs", "numbers", "codes", "codes", "uuids"))](rng, split)


def _listed(rng: random.Random, split: str) -> tuple[str, str]:
    strings: list[str] = []
    while sum(map(len, strings)) < ROOM:
        strings.append(_drawn(rng, split))
    mark = rng.choice((" ", ", ", "\n", " / ", "; "))
    asked = mark.join(strings)
    rng.shuffle(strings)
    return f"Copy: {asked}", "\n".join(f'"{s}"' for s in strings)


def _whole(rng: random.Random, split: str) -> tuple[str, str]:
    """Two lists among other words, each said as it stands: as the keys of a question are."""
    questions, lists = [], []
    for _ in range(2):
        kind = rng.choice(("words", "pairs", "numbers", "codes", "codes"))
        strings = [STRINGS[kind](rng, split) for _ in range(rng.randint(2, 3))]
        lists.append(", ".join(strings[:-1]) + rng.choice(LAST) + strings[-1])
        questions.append(phrased(rng, MANY, split).format(kind=any_word(rng), key=lists[-1]))
    rng.shuffle(lists)
    return f"Copy: {saying(rng)} {' '.join(questions)}", "\n".join(f'"{s}"' for s in lists)


def _said(rng: random.Random, split: str) -> tuple[str, str]:
    """Sentences with a key and a value; then the keys and what stands around the values."""
    lines, copies = [], []
    for _ in range(2):
        sentence = phrased(rng, (*SENTENCES, *ONE), split)
        words = [
            _drawn(rng, split),
            _drawn(rng, split),
            f"{word(rng, split)} {rng.choice(of_split(KINDS, split))}",
        ]
        lines.append(sentence.format(key=words[0], value=words[1], kind=words[2]))
        copies += [w for w in words if w in lines[-1]]
    rng.shuffle(copies)
    return "Copy: " + " ".join(lines), "\n".join(f'"{s}"' for s in copies)


def samples(count: int, seed: int, split: str) -> Iterator[Conversation]:
    """`count` exercises; strings and sentences are those of the split."""
    for i in range(count):
        rng = random.Random(f"copying {seed_of(seed, split)} {i}")
        prompt, reply = (_listed, _said, _whole)[i % 3](rng, split)
        provenance = {
            "source": "copying",
            "split": split,
            "seed": seed,
            "index": i,
            "role": "exercise",
        }
        yield Conversation((spoken("user", prompt), spoken("assistant", reply)), provenance)


def _string(characters: str, rng: random.Random) -> str:
    return "".join(rng.choices(characters, k=DRILL))


def drills(count: int, seed: int, split: str) -> Iterator[Conversation]:
    """`count` drills: a random string, and its pieces in another order, each behind a quotation
    mark."""
    for i in range(count):
        rng = random.Random(f"drill {seed_of(seed, split)} {i}")
        characters, known_after = ALPHABETS[i % len(ALPHABETS)]
        text = drawn(rng, split, partial(_string, characters))
        pieces, rest = [], text
        while rest:
            cut = rng.randint(*PIECES)
            pieces.append(rest[:cut])
            rest = rest[cut:]
        rng.shuffle(pieces)
        reply, spans = "", []
        for piece in pieces:
            first = len(reply) + 1 + known_after
            reply += f'"{piece}'
            if first < len(reply):
                spans.append([first, len(reply)])
        told = {"role": "assistant", "content": reply, "spans": spans}
        provenance = {
            "source": "drill",
            "split": split,
            "seed": seed,
            "index": i,
            "role": "exercise",
        }
        yield Conversation((spoken("user", text), told), provenance)
