"""Packing loses nothing, invents nothing and marks document starts."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mor_jax.data.packing import pack

BOS, EOS = 100, 101
documents_strategy = st.lists(st.lists(st.integers(0, 99), max_size=30), max_size=12)


@settings(max_examples=300, deadline=None)
@given(documents=documents_strategy, context=st.integers(2, 17))
def test_rows_are_the_documents_end_to_end(documents, context):
    rows = list(pack([np.array(d, np.uint16) for d in documents], context, bos=BOS, eos=EOS))
    whole = list(itertools.chain.from_iterable([BOS, *d, EOS] for d in documents))
    assert len(rows) == -(-len(whole) // context)
    for row in rows:
        assert {k: (v.dtype, v.shape) for k, v in row.items()} == {
            k: (np.dtype(np.int32), (context,)) for k in ("tokens", "segment_ids")
        }
    if not rows:
        return
    tokens = np.concatenate([r["tokens"] for r in rows])
    real = np.concatenate([r["segment_ids"] for r in rows]) > 0
    assert tokens[real].tolist() == whole
    # padding only at the very end
    assert real.tolist() == [True] * len(whole) + [False] * (len(real) - len(whole))


@settings(max_examples=300, deadline=None)
@given(documents=documents_strategy, context=st.integers(2, 17))
def test_segments_start_at_one_and_grow_at_each_document(documents, context):
    for row in pack([np.array(d, np.int32) for d in documents], context, bos=BOS, eos=EOS):
        segments, tokens = row["segment_ids"], row["tokens"]
        assert segments[0] == 1
        real = segments > 0
        starts = (tokens[1:] == BOS) & real[1:]
        grown = np.diff(segments)[real[1:]]
        assert (grown == starts[real[1:]]).all()


def test_by_hand():
    rows = list(pack([np.array([1, 2, 3]), np.array([], int), np.array([4])], 4, bos=BOS, eos=EOS))
    assert [r["tokens"].tolist() for r in rows] == [
        [BOS, 1, 2, 3],
        [EOS, BOS, EOS, BOS],
        [4, EOS, EOS, EOS],
    ]
    assert [r["segment_ids"].tolist() for r in rows] == [[1, 1, 1, 1], [1, 2, 2, 3], [1, 1, 0, 0]]


def test_streaming():
    endless = (np.array([i % 7]) for i in itertools.count())
    assert len(list(itertools.islice(pack(endless, 8, bos=BOS, eos=EOS), 5))) == 5
