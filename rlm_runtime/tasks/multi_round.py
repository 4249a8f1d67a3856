"""Multi-round needles, in the manner of MRCR: a long conversation in which the same request comes
up several times, and one of the replies has to be given back word for word.

A reply scores by the similarity of the texts, and nothing at all without the random prefix that was
asked for.
"""

from __future__ import annotations

import difflib
import random
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.tasks import words
from rlm_runtime.tasks.base import Example, Ruler, Task, text_of, writing

FORMS = """letter|short story|speech|diary entry|news item|riddle|recipe note|travel report|toast|review|sermon|weather
report|sales pitch|bedtime story|obituary|postcard""".replace("\n", " ").split("|")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789ABCDEFGHJKLMNPQRSTUVWXYZ"


class MultiRound(Task):
    """Knobs: `needles` (2..8): how often the same request is made; `sentences`: of a reply,
    about."""

    name = "multi_round"
    tips = (
        "The context is a conversation. Split it into turns by the lines that name the speaker, find the user's requests "
        "with exactly the wording asked about, and number them in order. Slice the reply out of the context; never retype "
        "it: each character counts, as does the prefix."
    )
    reply_tokens = 512

    def __init__(self, *, needles: int = 2, sentences: int = 8):
        if not 2 <= needles <= len(ORDINALS) or sentences < 2:
            raise UsageError(
                f"{self.name}: needles must be from 2 to {len(ORDINALS)} and sentences at least 2."
            )
        self.needles, self.sentences = needles, sentences

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        rng = self.rng(seed, index)
        form, topic = rng.choice(FORMS), self._topic(rng)
        which = rng.randrange(self.needles)
        prefix = "".join(rng.choice(ALPHABET) for _ in range(10))
        question = (
            f"Give back, word for word, the assistant's {ORDINALS[which]} {form} about {topic} in the conversation. Put "
            f"{prefix} directly in front of it and write nothing else."
        )
        needles = [self._round(rng, form, topic) for _ in range(self.needles)]
        room = (
            length - self.reply_tokens - ruler(question) - sum(ruler(_written(r)) for r in needles)
        )
        others, used, filler = 0, 0.0, self.rng(seed, index, "filler")
        # the length of each other round follows from the seed alone: count first, then write
        while True:
            cost = ruler(_written(self._other(filler, form, topic)))
            if used + cost > room:
                break
            used, others = used + cost, others + 1
        if room <= 0 or others < 1:
            raise self.too_short(length, length - room + 300)
        total = others + self.needles
        places = sorted(self.rng(seed, index, "places", total).sample(range(total), self.needles))
        at = dict(zip(places, needles, strict=True))
        filler = self.rng(seed, index, "filler")
        path = self.file(folder, length, seed, index)
        with writing(path) as file:
            for i in range(total):
                file.write(_written(at[i] if i in at else self._other(filler, form, topic)))
        meta = {
            "length": length,
            "seed": seed,
            "index": index,
            "prefix": prefix,
            "rounds": total,
            "places": places,
        }
        return Example(
            f"{self.name}-{length}-{seed}-{index}",
            path,
            question,
            prefix + needles[which][1],
            "",
            meta,
        )

    def score(self, example: Example, reply: Any) -> float:
        text, prefix = text_of(reply).strip(), example.meta["prefix"]
        if not text.startswith(prefix):
            return 0.0
        wanted, got = example.answer[len(prefix) :], text[len(prefix) :]
        return difflib.SequenceMatcher(None, wanted, got.lstrip(), autojunk=False).ratio()

    def _topic(self, rng: random.Random) -> str:
        return f"the {rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"

    def _round(self, rng: random.Random, form: str, topic: str) -> tuple[str, str]:
        """(what the user asks, what the assistant answers): one line each."""
        text = words.paragraph(
            rng, rng.randint(self.sentences // 2, self.sentences + self.sentences // 2)
        )
        return f"Write a {form} about {topic}.", f"About {topic}. {text}"

    def _other(self, rng: random.Random, form: str, topic: str) -> tuple[str, str]:
        """A round that shares the form or the topic with the needles at times, never both."""
        other_form, other_topic = rng.choice(FORMS), self._topic(rng)
        draw = rng.random()
        if draw < 0.15:
            other_form = form
        elif draw < 0.3:
            other_topic = topic
        if other_form == form and other_topic == topic:
            other_topic = f"{topic} at night"
        return self._round(rng, other_form, other_topic)


def _written(turn: tuple[str, str]) -> str:
    return f"User: {turn[0]}\nAssistant: {turn[1]}\n\n"
