"""A softmax in parts is a softmax, and bfloat16 rounds it the same way however the keys are
parted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.inference.engine.logs import Softmax

QUERIES, KEYS, WIDTH = 64, 96, 16


def attend(score_QxS, v_SxH, mask_QxS, edges, dtype):
    """In parts, in this order."""
    so_far = Softmax.empty((QUERIES, WIDTH))
    for start, stop in edges:
        part = slice(start, stop)

        def weigh(w, part=part):
            return jnp.einsum(
                "QS,SH->QH",
                w.astype(dtype),
                v_SxH[part].astype(dtype),
                preferred_element_type=jnp.float32,
            )

        so_far = so_far.add(score_QxS[:, part], mask_QxS[:, part], weigh)
    return so_far.result(dtype)


@pytest.fixture
def seen():
    rng = np.random.default_rng(0)
    score, v = rng.normal(size=(QUERIES, KEYS)) * 4, rng.normal(size=(KEYS, WIDTH))
    mask = rng.random((QUERIES, KEYS)) < 0.7
    return jnp.asarray(score, jnp.float32), jnp.asarray(v, jnp.float32), jnp.asarray(mask)


PARTS = (
    [(0, KEYS)],
    [(0, 31), (31, KEYS)],
    [(90, KEYS), (0, 64), (64, 90)],
    [(i, i + 8) for i in range(0, KEYS, 8)],
)


@pytest.mark.parametrize("edges", PARTS)
def test_it_is_a_softmax(seen, edges):
    score, v, mask = seen
    want = jax.nn.softmax(jnp.where(mask, score, -jnp.inf), axis=-1) @ v
    np.testing.assert_allclose(attend(*seen, edges, jnp.float32), want, atol=1e-5)


@pytest.mark.parametrize("edges", PARTS[1:])
def test_the_parting_of_the_keys_hardly_ever_shows_in_bfloat16(seen, edges):
    """Sums of float32 in another order fall on another side of a rounding edge once in thousands;
    weights rounded off another maximum would do it to every tenth result."""
    whole, parted = (
        np.asarray(attend(*seen, e, jnp.bfloat16), np.float32) for e in (PARTS[0], edges)
    )
    assert np.mean(whole != parted) < 0.01
    np.testing.assert_allclose(parted, whole, rtol=0.01, atol=1e-3)


def test_keys_nobody_sees_change_no_bit(seen):
    score, v, mask = seen
    before = Softmax.empty((QUERIES, WIDTH)).add(score, mask, lambda w: w @ v)
    after = before.add(score + 100, mask & False, lambda w: w @ v)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    blind = Softmax.empty((QUERIES, WIDTH)).add(score, mask & False, lambda w: w @ v)
    assert not np.any(blind.result(jnp.float32))
