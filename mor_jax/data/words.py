"""Encoding word by word with a memory of the words seen.

Text repeats its words: the 2.6 million of the Python standard library are 48,000 different ones,
and looking them up is several times faster than the tokenizers library is (12 MB in 3 s against 11
s, one core). The words must be exactly those that the library would cut the text into, so this is
for GPT-2's pattern and ASCII text only; all else goes to the library, which is also the oracle in
the tests.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

# GPT-2's pattern on ASCII text. re.A matters: Python's own \s includes \x1c-\x1f, Unicode's
# White_Space does not.
WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.A
)
LIMIT = 1 << 18  # words remembered, about 50 MB; then it starts anew


class WordEncoder:
    """`encode`: what the library does to texts, each of which may be a single word."""

    def __init__(self, encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]):
        self._encode = encode
        self._known: dict[str, Sequence[int]] = {}

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each of `texts`, which must be ASCII. Safe to call from several threads."""
        words = [WORD.findall(text) for text in texts]
        if len(self._known) > LIMIT:
            self._known = {}
        known = self._known  # another thread may start anew meanwhile
        new = list(set(itertools.chain.from_iterable(words)) - known.keys())
        known.update(zip(new, self._encode(new), strict=True))
        ids = (itertools.chain.from_iterable(map(known.__getitem__, text)) for text in words)
        return [np.fromiter(text, np.int32) for text in ids]
