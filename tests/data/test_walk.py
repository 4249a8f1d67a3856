"""The walk task: its rows are what they say, and cannot be guessed."""

import numpy as np
import pytest

from mor_jax.data.walk import walks


def test_a_walk_reaches_its_root_after_its_distance_and_stays():
    rows, nodes, hops = 400, 12, 8
    found = walks(3, rows, nodes, tuple(range(1, 11)), hops)
    parent, start = found.tokens_BxT[:, :nodes], found.tokens_BxT[:, nodes]
    at, every = start.copy(), np.arange(rows)
    for t in range(11):
        np.testing.assert_array_equal(at == found.root_B, t >= found.distance_B)
        at = parent[every, at]
        if t < hops:
            np.testing.assert_array_equal(at, found.steps_BxM[:, t])
    assert set(found.distance_B) == set(range(1, 11))
    # Disjoint chains: no node has two children.
    for row in parent:
        children = row[row != np.arange(nodes)]
        assert len(set(children)) == len(children)


def test_rows_are_a_function_of_the_seed_and_roots_are_many():
    a, b, c = (walks(seed, 500, 12, (5,), 8) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.tokens_BxT, b.tokens_BxT)
    assert (a.tokens_BxT != c.tokens_BxT).any()
    roots = (a.tokens_BxT[:, :12] == np.arange(12)).sum(axis=1)
    assert roots.mean() > 2  # guessing one is right in less than half of the rows
    batch = a.batch()
    assert batch["weights"].sum() == 500 and (batch["weights"][:, -1] == 1).all()
    np.testing.assert_array_equal(batch["step_targets"][:, -2], a.steps_BxM)
    with pytest.raises(ValueError, match="distances must lie in"):
        walks(0, 4, 12, (12,), 8)
