"""Verbatim copy: give back one block of a text exactly. Blocks are made of fragments put together
at random, so nothing can be guessed. Knobs as in Prime Intellect's environment of that name:
content type, target length, fragment length.
"""

from __future__ import annotations

import functools
import json
import random
import re
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.tasks import words
from rlm_runtime.tasks.base import Example, Ruler, Task, text_of, writing

CONTENTS = ("words", "json", "csv", "codes", "mixed", "all")
CODE = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz23456789-_/+"


class Verbatim(Task):
    """Knobs: `content` words | json | csv | codes | mixed (within a block) | all (a type for each
    block); `target_length` of a block and `fragment_length`, in characters."""

    name = "verbatim"
    tips = (
        "Find the marks in front of and behind the block that is asked for, and take the slice between them from the "
        "context. Hand in that slice, not a copy you wrote: spaces and punctuation count."
    )
    reply_tokens = 256

    def __init__(
        self, *, content: str = "all", target_length: int = 500, fragment_length: int = 20
    ):
        if content not in CONTENTS:
            raise UsageError(
                f"{self.name}: content={content!r}; expected one of {', '.join(CONTENTS)}."
            )
        if target_length < 20 or fragment_length < 2:
            raise UsageError(
                f"{self.name}: target_length is at least 20 and fragment_length at least 2."
            )
        self.content, self.target, self.fragment = content, target_length, fragment_length

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        room = length - max(self.reply_tokens, self.target / 4) - 60
        path = self.file(folder, length, seed, index)
        count, used = 0, 0.0
        with writing(path) as file:
            while True:
                framed = _framed(count + 1, self._block(seed, index, count + 1))
                used += ruler(framed)
                if used > room:
                    break
                file.write(framed)
                count += 1
        if count < 1:
            path.unlink(missing_ok=True)
            raise self.too_short(length, length - room + self.target / 2)
        chosen = self.rng(seed, index, "chosen").randint(1, count)
        answer = self._block(seed, index, chosen)
        question = (
            f"Give back block {chosen} exactly as it stands between its two marker lines, character for character, and "
            "nothing else."
        )
        meta = {"length": length, "seed": seed, "index": index, "block": chosen, "blocks": count}
        return Example(f"{self.name}-{length}-{seed}-{index}", path, question, answer, "", meta)

    def score(self, example: Example, reply: Any) -> float:
        """1 for the exact text, a code fence and white space around it aside."""
        text = reply if isinstance(reply, str) else text_of(reply)
        fenced = re.fullmatch(r"\s*```[^\n]*\n(.*?)\n?```\s*", text, re.DOTALL)
        return float((fenced[1] if fenced else text).strip() == example.answer.strip())

    def _block(self, seed: int, index: int, number: int) -> str:
        rng = self.rng(seed, index, number)
        kind = rng.choice(CONTENTS[:5]) if self.content == "all" else self.content
        pools = [_pool(k) for k in (CONTENTS[:4] if kind == "mixed" else (kind,))]
        parts: list[str] = []
        size, draw = 0, rng.random
        while size < self.target:
            pool = pools[int(draw() * len(pools))]
            begin = int(draw() * len(pool))
            piece = pool[begin : begin + max(2, round(rng.expovariate(1 / self.fragment)))]
            parts.append(piece)
            size += len(piece)
        return "".join(parts)[: self.target].replace("=====", "====-").strip() or "empty"


@functools.cache
def _pool(kind: str) -> str:
    """A long text of one type that fragments are cut from."""
    rng = random.Random(f"verbatim pool {kind}")
    return "".join(_source(rng, kind) for _ in range(800))


def _source(rng: random.Random, kind: str) -> str:
    if kind == "words":
        return (
            " ".join(
                rng.choice(words.NOUNS if rng.random() < 0.6 else words.ADJECTIVES)
                for _ in range(24)
            )
            + " "
        )
    if kind == "json":
        record = {
            rng.choice(words.NOUNS): rng.choice(
                [rng.randint(0, 9999), rng.choice(words.PEOPLE), [rng.random()]]
            )
            for _ in range(6)
        }
        return json.dumps(record) + "\n"
    if kind == "csv":
        rows = [
            f"{rng.randint(1, 9999)},{rng.choice(words.PLACES)},{rng.random():.4f},{words.phrase(rng)}"
            for _ in range(5)
        ]
        return "\n".join(rows) + "\n"
    return "".join(rng.choice(CODE) for _ in range(140))


def _framed(number: int, block: str) -> str:
    return f"===== block {number} =====\n{block}\n===== end of block {number} =====\n"
