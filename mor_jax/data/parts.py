"""Tokenised documents in part files: each is written atomically, so a killed preparation goes on
from the last one."""

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


class Part(NamedTuple):
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


def read_part(path: Path) -> Part:
    with np.load(path) as arrays:
        return Part(**{name: arrays[name] for name in Part._fields})


def _read_finished(path: Path) -> Part | None:
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


def _tokenize(batch: list[tuple[int, Document, bool]], encode: Encode, vocab_size: int) -> Part:
    encoded = encode([document.text for _, document, _ in batch])
    weights = [e.weights for e in encoded if e.weights is not None]
    return Part(
        tokens=np.concatenate([e.ids for e in encoded]).astype(np.min_scalar_type(vocab_size)),
        lengths=np.array([len(e.ids) for e in encoded], np.int64),
        sizes=np.array([size for size, _, _ in batch], np.int64),
        held_out=np.array([held_out for _, _, held_out in batch], bool),
        weights=np.concatenate(weights) if weights else np.zeros(0, np.float32),
        seconds=np.array([e.second for e in encoded], np.int64),
    )
