"""The trigram floor: a probability distribution, better than a unigram, never infinite."""

import numpy as np
import pytest

from mor_jax.analysis.ngram import TrigramByteModel, rows_to_bytes

TEXT = [
    f"the {a} {b} sat on the {c} mat and looked at the {a}\n".encode()
    for a in ("cat", "dog", "bird", "old man")
    for b in ("slowly", "never", "has")
    for c in ("red", "blue", "wet")
]


def entropy(documents):
    counts = np.bincount(np.frombuffer(b"".join(documents), np.uint8), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


@pytest.mark.parametrize("context", [b"", b"t", b"th", b"xxthe", b"\x00\xff", b"q"])
def test_probabilities_sum_to_one(context):
    p = TrigramByteModel.fit(TEXT).probabilities(context)
    assert p.shape == (256,)
    assert p.sum() == pytest.approx(1)
    assert (p > 0).all()


def test_it_equals_witten_bell_by_hand():
    model = TrigramByteModel.fit([b"ab", b"ac"])
    # Unigram: a 2, b 1, c 1, four bytes of three types; after (start, a): b and c once each.
    uni = (1 + 3 / 256) / (4 + 3)
    after_a = (1 + 2 * uni) / (2 + 2)
    assert model.probabilities(b"a")[ord("b")] == pytest.approx((1 + 2 * after_a) / (2 + 2))
    # The context "za" was never seen, "a" was.
    assert model.probabilities(b"za")[ord("b")] == pytest.approx(after_a)


def test_it_beats_the_unigram_entropy_and_generalises():
    train, test = TEXT[::2], TEXT[1::2]
    assert TrigramByteModel.fit(train).bits_per_byte(test) < 0.6 * entropy(test)


def test_random_bytes_cost_eight_bits():
    """The trigram counts of noise predict nothing; the tuned strengths must notice."""
    rng = np.random.default_rng(0)
    train, test = [rng.bytes(10_000) for _ in range(20)], rng.bytes(20_000)
    assert TrigramByteModel.fit(train).bits_per_byte([test]) == pytest.approx(8, abs=0.02)
    assert TrigramByteModel.fit([]).bits_per_byte([test]) == pytest.approx(8)


def test_unseen_bytes_are_finite():
    assert np.isfinite(TrigramByteModel.fit([b"aaaa"]).bits_per_byte([bytes(range(256))]))


def test_documents_are_independent():
    model = TrigramByteModel.fit(TEXT)
    together = model.bits_per_byte(TEXT[:2])
    a, b = (model.bits_per_byte([t]) for t in TEXT[:2])
    assert together == pytest.approx(
        (a * len(TEXT[0]) + b * len(TEXT[1])) / (len(TEXT[0]) + len(TEXT[1]))
    )
    assert np.isnan(model.bits_per_byte([]))
    assert np.isnan(model.bits_per_byte([b""]))


def test_strengths_are_tuned_on_training_documents_only():
    assert TrigramByteModel.fit(TEXT[:9]).strengths == (1.0, 1.0, 1.0)
    rng = np.random.default_rng(0)
    assert TrigramByteModel.fit([rng.bytes(1000) for _ in range(20)]).strengths[2] > 100
    # The tuning documents are part of the model: a letter of the tenth document is more likely than
    # an unseen one.
    p = TrigramByteModel.fit([*TEXT[:9], TEXT[9] + b"Z"]).probabilities()
    assert p[ord("Z")] > 2 * p[ord("Y")]


def test_chunks_do_not_matter(monkeypatch):
    whole = TrigramByteModel.fit(TEXT).bits_per_byte(TEXT)
    monkeypatch.setattr("mor_jax.analysis.ngram.CHUNK", 100)
    assert TrigramByteModel.fit(TEXT).bits_per_byte(TEXT) == pytest.approx(whole)


def test_rows_give_the_pieces_of_documents():
    class Bytes:
        def piece(self, token):
            return bytes([token]) if token < 256 else b""

    rows = [
        {
            "tokens": np.array([256, 97, 98, 256, 99, 0]),
            "segment_ids": np.array([1, 1, 1, 2, 2, 0]),
        },
        {"tokens": np.array([100, 256]), "segment_ids": np.array([1, 2])},
    ]
    assert list(rows_to_bytes(rows, Bytes())) == [b"ab", b"c", b"d"]
