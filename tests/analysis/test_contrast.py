"""Orderings held against runs: the interval is Student's, seeds are paired, and few seeds allow no
claim."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor_jax.analysis.contrast import AGREES, DISAGREES, OPEN, Contrast, judge, paired, sentence

CONTRAST = Contrast("a", "b", 0.06, "somewhere")
values = st.lists(st.floats(-5, 5), min_size=3, max_size=6)


def by_seed(numbers):
    return dict(enumerate(numbers))


def test_the_interval_of_three_seeds_by_hand():
    found = paired(by_seed([0.0, 0.0, 0.0]), by_seed([1.0, 2.0, 3.0]))
    # Student's t at 97.5 % and two degrees of freedom is 4.303; the standard error of 1, 2, 3 is 1
    # / sqrt(3).
    assert found.interval == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert found.verdict == OPEN


@given(values, st.floats(-3, 3), st.data())
def test_what_a_seed_does_to_both_cancels(noise, gap, data):
    shifts = data.draw(st.lists(st.floats(-100, 100), min_size=len(noise), max_size=len(noise)))
    plain = paired(by_seed([0.0] * len(noise)), by_seed([gap + n for n in noise]))
    shifted = paired(
        by_seed(shifts), by_seed([s + gap + n for s, n in zip(shifts, noise, strict=True)])
    )
    np.testing.assert_allclose(shifted.interval, plain.interval, atol=1e-9)


@given(values, values)
def test_the_verdict_turns_with_the_order(a, b):
    n = min(len(a), len(b))
    one, other = paired(by_seed(a[:n]), by_seed(b[:n])), paired(by_seed(b[:n]), by_seed(a[:n]))
    assert {AGREES: DISAGREES, DISAGREES: AGREES, OPEN: OPEN}[one.verdict] == other.verdict
    low, high = one.interval
    assert (one.verdict == OPEN) == (low <= 0 <= high)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.3, 1.0, size=(4000, 3))
    covered = [
        low <= 0.3 <= high
        for low, high in (paired(by_seed([0.0] * 3), by_seed(d)).interval for d in draws)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_only_seeds_that_both_have_are_compared():
    found = paired({0: 1.0, 1: 2.0, 5: 9.0}, {1: 3.0, 0: 1.5, 7: 0.0})
    assert found.seeds == (0, 1) and found.differences == (0.5, 1.0)
    assert paired({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("b", "said"),
    [
        ({}, "not measured yet"),
        ({0: 1.1}, "one seed, which allows no claim"),
        ({0: 1.1, 1: 1.11, 2: 1.09}, "our runs agree"),
        ({0: 0.9, 1: 0.91, 2: 0.89}, "our runs show the opposite"),
        ({0: 0.9, 1: 1.2, 2: 1.0}, "the spread over seeds does not allow a claim"),
    ],
)
def test_sentences(b, said):
    ((contrast, found),) = judge([CONTRAST], {"a": {0: 1.0, 1: 1.0, 2: 1.0}, "b": b})
    text = sentence(contrast, found)
    assert text.startswith("a below b (paper: by 0.060, somewhere)") and said in text
