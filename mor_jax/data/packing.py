"""Concatenate, then split: documents end to end, cut into rows of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

Row = dict[str, np.ndarray]  # {"tokens": int32[context], "segment_ids": int32[context]}


def pack(documents: Iterable[np.ndarray], context: int, *, bos: int, eos: int) -> Iterator[Row]:
    """Rows of exactly `context` tokens from token ids of documents, streamed.

    Each document becomes [bos, *ids, eos]; the documents follow one another without gaps and a document may run
    over any number of rows. `segment_ids` starts at 1 in each row and grows by one at each document start after the
    row's first position. What is left of the last row holds eos with segment 0.
    """
    tokens, segments = _blank(context, eos)
    at = segment = 0  # next free position, segment of the position before it
    for ids in documents:
        document = np.concatenate([[bos], ids, [eos]]).astype(np.int32)
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


def _blank(context: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(context, eos, np.int32), np.zeros(context, np.int32)
