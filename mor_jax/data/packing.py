"""Documents become rows of one length: text is concatenated and cut, conversations are placed
whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mor_jax.data.parts import Encoded

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
