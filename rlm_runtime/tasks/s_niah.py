"""Needles in a haystack, after RULER (Hsieh et al. 2024, `niah.py`): haystacks of noise, prose or
other needles; one or more keys, values and queries.

What follows RULER: the needle sentence, the five-sentence noise, where needles go (noise and
needles: at random distinct lines; prose: at depths drawn from 40 evenly spaced ones), the room left
for the reply, the singular wording for one answer, and the score. What is our own: words, prose,
and the wording of the question.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.tasks import words
from rlm_runtime.tasks.base import Example, Ruler, Task, text_of, writing

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = 40
KINDS = {"words": words.phrase, "numbers": words.number, "uuids": words.identifier}
SINGULAR = {"words": "word", "numbers": "number", "uuids": "uuid"}
POOL = 6000  # sentences of prose a haystack is drawn from


class SNiah(Task):
    """Knobs: `haystack` noise | essay | needle; `keys`, `values` of each key, `queries`;
    `key_type`, `value_type` words | numbers | uuids."""

    name = "s_niah"
    tips = (
        "The facts asked for are single sentences of one fixed form, scattered in text that has nothing to do with them. "
        "Print one, write a regular expression for the form, collect all matches, and keep those of the keys in the "
        "question. There may be several values for a key. No model call is needed."
    )

    def __init__(
        self,
        *,
        haystack: str = "noise",
        keys: int = 1,
        values: int = 1,
        queries: int = 1,
        key_type: str = "words",
        value_type: str = "numbers",
    ):
        for given, allowed, what in (
            (haystack, ("noise", "essay", "needle"), "haystack"),
            (key_type, KINDS, "key_type"),
            (value_type, KINDS, "value_type"),
        ):
            if given not in allowed:
                raise UsageError(
                    f"{self.name}: {what}={given!r}; expected one of {', '.join(allowed)}."
                )
        if min(keys, values, queries) < 1:
            raise UsageError(f"{self.name}: keys, values and queries are at least 1.")
        self.haystack, self.keys, self.values, self.queries = (
            haystack,
            max(keys, queries),
            values,
            queries,
        )
        self.key_type, self.value_type = key_type, value_type

    def _build(self, length: int, seed: int, index: int, folder: Path, ruler: Ruler) -> Example:
        rng = self.rng(seed, index)  # the same needles at every length
        pairs: dict[str, list[str]] = {}
        while len(pairs) < self.keys:
            pairs.setdefault(KINDS[self.key_type](rng), [])
        taken: set[str] = set()
        for values in pairs.values():
            while len(values) < self.values:
                value = KINDS[self.value_type](rng)
                if value not in taken:
                    taken.add(value)
                    values.append(value)
        needles = [self._needle(key, value) for key, values in pairs.items() for value in values]
        rng.shuffle(needles)
        asked = rng.sample(list(pairs), self.queries)
        answer = [value for key in asked for value in pairs[key]]
        question, intro = self._ask(asked, len(answer) == 1)
        room = (
            length
            - self.reply_tokens
            - ruler(intro)
            - ruler(question)
            - sum(ruler(n + "\n") for n in needles)
        )
        path = self.file(folder, length, seed, index)
        lines, places = self._write(path, room, needles, set(pairs), taken, seed, index, ruler)
        if lines < 1:
            raise self.too_short(length, length - room + ruler(NOISE))
        meta = {
            "length": length,
            "seed": seed,
            "index": index,
            "queries": asked,
            "lines": lines,
            "places": places,
        }
        return Example(f"{self.name}-{length}-{seed}-{index}", path, question, answer, intro, meta)

    def score(self, example: Example, reply: Any) -> float:
        """RULER's string_match_all: the share of the answers that stand in the reply, whatever the
        case."""
        text = text_of(reply).lower()
        return sum(value.lower() in text for value in example.answer) / len(example.answer)

    # -- the parts of the text

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_type, key=key, value=value)

    def _ask(self, asked: list[str], one: bool) -> tuple[str, str]:
        kind = SINGULAR[self.value_type] if one else self.value_type
        listed = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
        if one:
            question = f"What is the special magic {kind} for {listed} mentioned in the text?"
            intro = f"A special magic {kind} is hidden in the following text. Remember it: you will be asked for it below."
        else:
            question = f"What are all the special magic {kind} for {listed} mentioned in the text?"
            intro = f"Some special magic {kind} are hidden in the following text. Remember them: you will be asked below."
        return f"{question} Answer with nothing but the {kind}.", intro

    def _write(
        self,
        path: Path,
        room: float,
        needles: list[str],
        keys: set[str],
        taken: set[str],
        seed: int,
        index: int,
        ruler: Ruler,
    ) -> tuple[int, list[int]]:
        """Stream the haystack; returns its number of lines or sentences and where the needles stand
        among them."""
        if self.haystack == "essay":
            return self._write_essay(path, room, needles, seed, index, ruler)
        straw = self._straw(keys, taken, seed, index)
        if self.haystack == "noise":
            count = int(room // ruler(NOISE + "\n"))
        else:
            sample = self._straw(keys, taken, seed, index)
            average = sum(ruler(next(sample) + "\n") for _ in range(200)) / 200
            count = int(room / average)
            if average <= 0:
                count = 0
        if count < 1:
            return 0, []
        total = count + len(needles)
        places = sorted(self.rng(seed, index, "places", total).sample(range(total), len(needles)))
        at = dict(zip(places, needles, strict=True))
        used = 0.0
        with writing(path) as file:
            for line in range(total):
                if line in at:
                    file.write(at[line] + "\n")
                    continue
                text = next(straw)
                used += ruler(text + "\n")
                if used <= room:  # the average may have promised a line too many
                    file.write(text + "\n")
        return count, places

    def _straw(self, keys: set[str], taken: set[str], seed: int, index: int) -> Iterator[str]:
        if self.haystack == "noise":
            while True:
                yield NOISE
        rng = self.rng(seed, index, "distractors")
        make_key, make_value = KINDS[self.key_type], KINDS[self.value_type]
        while True:
            key, value = make_key(rng), make_value(rng)
            if (
                key not in keys and value not in taken
            ):  # a distractor that answers the question would be a second needle
                yield self._needle(key, value)

    def _write_essay(
        self, path: Path, room: float, needles: list[str], seed: int, index: int, ruler: Ruler
    ) -> tuple[int, list[int]]:
        pool_rng = self.rng("pool", seed)
        pool = [words.sentence(pool_rng) for _ in range(POOL)]
        costs = [ruler(" " + s) for s in pool]
        rng = self.rng(seed, index, "essay")
        picks, used = [], 0.0
        while used < room:
            pick = int(rng.random() * POOL)
            used += costs[pick]
            picks.append(pick)
        picks = picks[:-1]
        if not picks:
            return 0, []
        percent = [round(100 * i / (DEPTHS - 1)) for i in range(DEPTHS)]
        chooser = self.rng(seed, index, "depths")
        depths = (
            chooser.sample(percent, len(needles))
            if len(needles) <= DEPTHS
            else chooser.choices(percent, k=len(needles))
        )
        at: dict[int, list[str]] = {}
        for depth, needle in zip(depths, needles, strict=True):
            at.setdefault(len(picks) * depth // 100, []).append(needle)
        with writing(path) as file:
            for i, pick in enumerate(picks):
                for needle in at.get(i, ()):
                    file.write(needle + " ")
                file.write(pool[pick] + ("\n" if i % 7 == 6 else " "))
            for needle in at.get(len(picks), ()):
                file.write(needle + " ")
        return len(picks), sorted(at)
