"""Tokenised documents become rows of one length: text is concatenated and cut, conversations are
placed whole.

In between, tokens lie in part files. Each is written atomically, so a killed preparation goes on
from the last one.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mor_jax.data.documents import Document

PART_BYTES = 4 << 20  # of UTF-8 text; what a kill can lose, and what one tokeniser call gets


class Encoded(NamedTuple):
    """One document as tokens.

    weights: float32, of the loss of predicting each token; None: 1 for all. second: of a pair,
    where its second conversation begins; 0: no pair."""

    ids: np.ndarray
    weights: np.ndarray | None = None
    second: int = 0


Encode = Callable[[list[str]], list[Encoded]]


class TokenPart(NamedTuple):
    """Documents in corpus order.

    tokens: ids of all documents, end to end, without bos and eos; the smallest unsigned type that
    holds them.
    lengths: int64[documents], tokens of each. sizes: int64[documents], UTF-8 bytes of each.
    held_out: bool[documents]. weights: float32, one a token, or empty where all are 1. seconds:
    int64[documents], see `Encoded`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    held_out: np.ndarray
    weights: np.ndarray
    seconds: np.ndarray


def write_parts(
    documents: Iterable[tuple[Document, bool]],
    encode: Encode,
    vocab_size: int,
    directory: Path,
    advance: Callable[[float], None],
) -> list[Path]:
    """Tokenise (document, held out) pairs into part files, reusing those already in `directory`.

    `documents` must be the same sequence each time. `advance` is called with UTF-8 bytes done.
    Returns the files in order."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    documents = iter(documents)
    while (part := _read_finished(path := directory / f"{len(paths):06d}.npz")) is not None:
        paths.append(path)
        for _ in part.lengths:
            next(documents, None)
        advance(float(part.sizes.sum()))
    for batch in _batches(documents):
        path = directory / f"{len(paths):06d}.npz"
        part = _tokenize(batch, encode, vocab_size)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        with open(draft, "wb") as f:
            np.savez(f, **part._asdict())
        os.replace(draft, path)
        paths.append(path)
        advance(float(part.sizes.sum()))
    return paths


def read_documents(paths: Iterable[Path], held_out: bool) -> Iterator[Encoded]:
    """Each document on one side of the split, in corpus order."""
    for path in paths:
        part = read_part(path)
        ends = np.cumsum(part.lengths)
        every = zip(ends, part.lengths, part.held_out, part.seconds, strict=True)
        for end, length, out, second in every:
            if out == held_out:
                place = slice(end - length, end)
                weights = part.weights[place] if len(part.weights) else None
                yield Encoded(part.tokens[place], weights, int(second))


def read_part(path: Path) -> TokenPart:
    with np.load(path) as arrays:
        return TokenPart(**{name: arrays[name] for name in TokenPart._fields})


def _read_finished(path: Path) -> TokenPart | None:
    """None for a part that does not exist or that a power cut left damaged."""
    try:
        return read_part(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _batches(
    documents: Iterable[tuple[Document, bool]],
) -> Iterator[list[tuple[int, Document, bool]]]:
    batch: list[tuple[int, Document, bool]] = []
    size = 0
    for document, held_out in documents:
        batch.append((len(document.text.encode()), document, held_out))
        size += batch[-1][0]
        if size >= PART_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(
    batch: list[tuple[int, Document, bool]], encode: Encode, vocab_size: int
) -> TokenPart:
    encoded = encode([document.text for _, document, _ in batch])
    weights = [e.weights for e in encoded if e.weights is not None]
    return TokenPart(
        tokens=np.concatenate([e.ids for e in encoded]).astype(np.min_scalar_type(vocab_size)),
        lengths=np.array([len(e.ids) for e in encoded], np.int64),
        sizes=np.array([size for size, _, _ in batch], np.int64),
        held_out=np.array([held_out for _, _, held_out in batch], bool),
        weights=np.concatenate(weights) if weights else np.zeros(0, np.float32),
        seconds=np.array([e.second for e in encoded], np.int64),
    )


# {"tokens": int32[context], "segment_ids": int32[context]}, for conversations also "weights":
# float32[context]
Row = dict[str, np.ndarray]
OPEN_ROWS = 64  # that a conversation may be placed in


def pack(
    documents: Iterable[np.ndarray], context: int, *, bos: int | None, eos: int
) -> Iterator[Row]:
    """Rows of exactly `context` tokens from token ids of documents, streamed.

    Each document becomes [bos, *ids, eos], or [*ids, eos] where bos is None; the documents follow
    one another without gaps and a document may run over any number of rows. `segment_ids` starts at
    1 in each row and grows by one at each document start after the row's first position. What is
    left of the last row holds eos with segment 0.
    """
    tokens, segments = _blank(context, eos)
    at = segment = 0  # next free position, segment of the position before it
    for ids in documents:
        document = np.concatenate([[] if bos is None else [bos], ids, [eos]]).astype(np.int32)
        start = 0
        segment += 1
        while start < len(document):
            n = min(context - at, len(document) - start)
            tokens[at : at + n] = document[start : start + n]
            segments[at : at + n] = segment
            at, start = at + n, start + n
            if at == context:
                yield {"tokens": tokens, "segment_ids": segments}
                tokens, segments = _blank(context, eos)
                at, segment = 0, int(start < len(document))
    if at:
        yield {"tokens": tokens, "segment_ids": segments}


def pack_whole(samples: Iterable[Encoded], context: int, *, eos: int) -> Iterator[Row]:
    """Rows of `context` tokens in which no sample is cut, streamed.

    Best fit: each sample goes into the open row with the least room that holds it. A sample is a
    segment of its own, so samples do not see each other; a pair is two, side by side, so of pairs
    alone the p-th of a row is segments 2p - 1 and 2p. What is left of a row holds eos with segment
    0 and weight 0.

    Args:
      samples: of at most `context` tokens each, with weights; empty ones are passed over.
    """
    rows: list[list[Encoded]] = []
    room: list[int] = []

    def close(i: int) -> Row:
        room.pop(i)
        return _joined(rows.pop(i), context, eos)

    for sample in samples:
        size = len(sample.ids)
        if not size:
            continue
        fits = [i for i, left in enumerate(room) if left >= size]
        if not fits:
            if len(rows) == OPEN_ROWS:
                yield close(room.index(min(room)))
            rows.append([])
            room.append(context)
            fits = [len(rows) - 1]
        best = min(fits, key=room.__getitem__)
        rows[best].append(sample)
        room[best] -= size
        if not room[best]:
            yield close(best)
    while rows:
        yield close(0)


def _joined(samples: list[Encoded], context: int, eos: int) -> Row:
    tokens, segments = _blank(context, eos)
    weights, at, segment = np.zeros(context, np.float32), 0, 0
    for ids, own, second in samples:
        place = slice(at, at + len(ids))
        tokens[place], weights[place] = ids, 1.0 if own is None else own
        segment += 1
        segments[place] = segment
        if second:
            segment += 1
            segments[at + second : place.stop] = segment
        at += len(ids)
    return {"tokens": tokens, "segment_ids": segments, "weights": weights}


def _blank(context: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(context, eos, np.int32), np.zeros(context, np.int32)
