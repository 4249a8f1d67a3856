"""What a long-context task is: examples made from a seed at any length, and a score for a reply.

The context of an example is a text file, written as a stream, so a length of ten million tokens
takes seconds and no memory. The same task, seed, index and length give the same bytes on every
machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rlm_runtime.errors import UsageError

CHARS_PER_TOKEN = 4.0  # where no tokenizer is given
Tokens = Callable[[str], int]  # number of tokens of a text


@dataclass(frozen=True)
class Example:
    """`context` is a text file. `answer` is JSON; what it means only the task's `score` knows.
    `intro` goes before the context where a model is given both in one prompt."""

    id: str
    context: Path
    question: str
    answer: Any
    intro: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def prompt(self) -> str:
        """Context and question as one prompt: what a model without a runtime is asked."""
        parts = [self.intro, self.context.read_text(encoding="utf-8"), self.question]
        return "\n\n".join(p for p in parts if p)


class Ruler:
    """Measures texts in tokens. A tokenizer's count of pieces adds up to a little more than of the
    whole, never less by more than a token a piece, so a text built of pieces that fit, fits."""

    def __init__(self, tokens: Tokens | None = None):
        self.tokens = tokens
        self._seen: dict[str, float] = {}

    def __call__(self, text: str) -> float:
        if self.tokens is None:
            return len(text) / CHARS_PER_TOKEN
        if len(text) > 2000:
            return float(self.tokens(text))
        if text not in self._seen:
            if len(self._seen) > 50_000:
                self._seen.clear()
            self._seen[text] = float(self.tokens(text))
        return self._seen[text]


class Task:
    """A family of examples. A new task is one file with a subclass, and one line in
    `tasks/__init__.py`.

    A subclass sets `name` and `about`, writes `_build` and `score`, and takes its knobs as keyword
    arguments.
    """

    name = "task"
    about = ""
    per_context = 1  # questions asked about one context
    bounded = False  # there is a largest length
    tips = ""  # how contexts of this kind are best worked: what the mode rlm+tips adds
    reply_tokens = 128  # left of the length for the reply, as RULER does

    def example(
        self,
        length: int,
        *,
        seed: int = 42,
        index: int = 0,
        folder: str | Path,
        tokens: Tokens | None = None,
    ) -> Example:
        """Example number `index` at `length` tokens (prompt and reply), its context written into
        `folder`.

        Raises UsageError for a length too short to hold the task.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return self._build(int(length), seed, index, folder, Ruler(tokens))

    def examples(
        self,
        length: int,
        count: int,
        *,
        seed: int = 42,
        folder: str | Path,
        tokens: Tokens | None = None,
    ) -> Iterator[Example]:
        for index in range(count):
            yield self.example(length, seed=seed, index=index, folder=folder, tokens=tokens)

    def score(self, example: Example, reply: Any) -> float:
        """0 to 1. `reply` is text, or any JSON value a run answered with."""
        raise TypeError(f"{type(self).__name__} has no score of its own")

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        raise TypeError(f"{type(self).__name__} has no examples of its own")

    # -- for subclasses

    def rng(self, *key: Any) -> random.Random:
        """Random numbers of this task and key; the same on every platform and Python version."""
        return random.Random(":".join(map(str, (self.name, *key))))

    def file(self, folder: Path, length: int, seed: int, index: int) -> Path:
        return folder / f"{self.name}-{length}-{seed}-{index // self.per_context}.txt"

    def too_short(self, length: int, needed: float) -> UsageError:
        return UsageError(
            f"{self.name}: a length of {length:,} tokens is too short; it takes about {math.ceil(needed):,}."
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name only when it is whole; the same example may be made twice
    at once."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def text_of(reply: Any) -> str:
    """A run's answer as text: what a model would have written."""
    if reply is None:
        return ""
    if isinstance(reply, str):
        return reply
    return json.dumps(reply, ensure_ascii=False)


def parse_length(text: str | int | float) -> int:
    """8k, 128k, 1M, 10M, 8192 as tokens (k is a thousand, Ki 1024). Raises UsageError."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "": 1}
    written = str(text).strip().lower().replace("_", "").replace(",", "")
    digits = written.rstrip("kmgi")
    try:
        value = float(digits) * units[written[len(digits) :]]
    except (ValueError, KeyError):
        raise UsageError(
            f"length {text!r}: expected a number of tokens such as 8k, 128k, 1M or 8192."
        ) from None
    if not (value >= 1 and math.isfinite(value)):
        raise UsageError(f"length {text!r}: expected at least one token.")
    return int(value)
