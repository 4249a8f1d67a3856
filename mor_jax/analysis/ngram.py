"""A byte-level trigram model: the floor a trained network has to beat.

It counts which byte follows which two bytes and knows nothing else, is fitted in seconds, and
depends on no tokenizer: bits per byte are comparable with those of any language model on the same
bytes.

Smoothing is interpolated Witten-Bell (Bell, Cleary & Witten 1990) with a strength s per context
length: a context seen n times with t different successors trusts its own counts with weight n / (n
+ s t) and the next shorter context with the rest,

    p(w | c) = (count(c, w) + s t(c) p(w | shorter c)) / (n(c) + s t(c)),

down to the uniform distribution over the 256 bytes. It sums to one by construction and gives no
byte probability zero. s is chosen from STRENGTHS on every tenth training document (the first 2 MiB
of them) with the counts of the others; the counts of all make the model. (Leaving out single bytes
instead needs no slice but flatters long contexts, for text repeats itself within a document.) A
corpus of fewer than ten documents takes s = 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np

START = 256  # stands before the first byte of a document, twice; never predicted
SYMBOLS = 257
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 256.0, 1e6)
TUNING_BYTES = 1 << 21  # enough to choose three numbers
CHUNK = 1 << 20  # symbols handled at once: bounds the memory of a long corpus, not the result


class TrigramByteModel:
    """Counts of the training bytes; use `fit`. Documents are independent: no context crosses their
    border."""

    def __init__(self, counts: np.ndarray, strengths: tuple[float, float, float] = (1.0, 1.0, 1.0)):
        """
        Args:
          counts: integers [257 * 257, 256], how often a byte followed (second to last, last)
            symbol.
          strengths: s of the contexts of length 0, 1 and 2.
        """
        by_last = counts.reshape(SYMBOLS, SYMBOLS, 256).sum(axis=0, dtype=np.int64)
        by_length = (by_last.sum(axis=0, keepdims=True), by_last, counts)
        self.strengths = strengths
        self._orders = [_Order(c) for c in by_length]

    @classmethod
    def fit(cls, documents: Iterable[bytes]) -> Self:
        """Count a corpus, one `bytes` a document. An empty corpus gives the uniform model."""
        tuning: list[bytes] = []
        counts = np.zeros(SYMBOLS * SYMBOLS * 256, np.int32)
        _count(_all_but_every_tenth(documents, tuning), counts)
        if not any(tuning):
            return cls(counts.reshape(-1, 256))
        strengths = cls(counts.reshape(-1, 256))._tune(tuning)
        _count(tuning, counts)
        return cls(counts.reshape(-1, 256), strengths)

    def bits_per_byte(self, documents: Iterable[bytes]) -> float:
        """Mean -log2 p of the bytes, each given the two before it in its document; nan when there
        are none."""
        bits, total = 0.0, 0
        for context, byte in _trigrams(documents):
            bits -= float(np.log2(self._probability(context, byte)).sum())
            total += len(byte)
        return bits / total if total else math.nan

    def probabilities(self, context: bytes = b"") -> np.ndarray:
        """Distribution over the next byte, float64 [256]; only the last two bytes of `context`
        matter."""
        a, b = ([START, START, *context[-2:]])[-2:]
        return self._probability(np.full(256, a * SYMBOLS + b), np.arange(256))

    def _probability(self, context: np.ndarray, byte: np.ndarray) -> np.ndarray:
        """p(byte | context), float64 [n], of context ids and bytes [n]."""
        p = np.full(len(byte), 1 / 256)
        for order, key, strength in zip(self._orders, _keys(context), self.strengths, strict=True):
            p = order.refine(key, byte, p, strength)
        return p

    def _tune(self, documents: list[bytes]) -> tuple[float, float, float]:
        """The strengths that predict these documents best, chosen one context length after the
        other."""
        context, byte = (np.concatenate(part) for part in zip(*_trigrams(documents), strict=True))
        p = np.full(len(byte), 1 / 256)
        chosen = []
        for order, key in zip(self._orders, _keys(context), strict=True):
            mixed = {s: order.refine(key, byte, p, s) for s in STRENGTHS}
            best = max(STRENGTHS, key=lambda s: np.log(mixed[s]).sum())
            chosen.append(best)
            p = mixed[best]
        first, second, third = chosen
        return first, second, third


class _Order:
    """One context length: counts [contexts, 256] and what Witten-Bell needs of them."""

    def __init__(self, counts: np.ndarray):
        self._counts = counts
        self._seen = counts.sum(axis=1, dtype=np.int64)
        self._types = np.count_nonzero(counts, axis=1)

    def refine(
        self, context: np.ndarray, byte: np.ndarray, shorter: np.ndarray, strength: float
    ) -> np.ndarray:
        """Mix the counts of these contexts with the probabilities under the shorter ones; all
        arrays [n]."""
        seen, trust = self._seen[context], strength * self._types[context]
        mixed = (self._counts[context, byte] + trust * shorter) / np.where(
            seen > 0, seen + trust, 1
        )
        return np.where(seen > 0, mixed, shorter)


def _keys(context: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The trigram context ids as contexts of length 0, 1 and 2."""
    return np.zeros_like(context), context % SYMBOLS, context


def _count(documents: Iterable[bytes], counts: np.ndarray) -> None:
    """Add the trigrams of the documents to `counts`, int32 [257 * 257 * 256]."""
    for context, byte in _trigrams(documents):
        keys, seen = np.unique(context * 256 + byte, return_counts=True)
        counts[keys] += seen.astype(np.int32)


def _all_but_every_tenth(documents: Iterable[bytes], tenth: list[bytes]) -> Iterator[bytes]:
    """Pass the documents on, putting every tenth one aside in `tenth` until that holds
    TUNING_BYTES."""
    size = 0
    for i, document in enumerate(documents):
        if i % 10 == 9 and size < TUNING_BYTES:
            tenth.append(document)
            size += len(document)
        else:
            yield document


def _trigrams(documents: Iterable[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(context ids int64 [n], bytes int64 [n]) of batches of documents of about CHUNK bytes
    together."""
    start = np.full(2, START, np.int64)
    for batch in _batches(documents):
        stream = np.concatenate(
            [part for d in batch for part in (start, np.frombuffer(d, np.uint8))]
        )
        real = stream[2:] != START  # START is context only
        yield (stream[:-2] * SYMBOLS + stream[1:-1])[real], stream[2:][real]


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def rows_to_bytes(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[bytes]:
    """The text of packed rows, one `bytes` for each piece of a document in a row.

    A document that was cut at the end of a row starts anew in the next one, exactly as the network
    sees it, so the two models are measured with the same contexts. Special tokens have no bytes and
    drop out.

    Args:
      rows: each {"tokens": int32 [T], "segment_ids": int32 [T]}; segment 0 is padding.
      tokenizer: of the rows, with `piece(id) -> bytes`, empty for special tokens.
    """
    for row in rows:
        tokens, segments = np.asarray(row["tokens"]), np.asarray(row["segment_ids"])
        pairs = zip(segments.tolist(), tokens.tolist(), strict=True)
        for segment, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            if segment:
                text = b"".join(tokenizer.piece(token) for _, token in group)
                if text:
                    yield text
