"""The trainer that makes an optimiser step after each segment, and the puzzles it is run on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor_jax.config import ModelConfig, RecursionConfig
from mor_jax.data.sudoku import CELLS, DIGITS, VOCABULARY, grids, puzzles
from mor_jax.model.lm import LM
from mor_jax.train import segments
from mor_jax.train.state import TrainState

MODEL = ModelConfig(
    layers=4,
    recursions=4,
    sharing="cycle",
    width=16,
    heads=2,
    kv_heads=2,
    mlp_width=24,
    vocab_size=VOCABULARY,
    context=CELLS,
    norm_placement="post",
    tied=False,
    init_std=0.1,
    attention="xla",
    bidirectional=True,
)
LM_ = LM(MODEL, recursion=RecursionConfig(state="drawn", injection="add", inner=1))


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(segments.init, LM_))(jax.random.key(0))


def rows(seed: int, n: int = 6) -> dict:
    return puzzles(seed, n).batch(np.arange(n))


def start(params, tx, average=None) -> tuple:
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), average)
    return state, segments.begin(LM_, rows(0))


def step_of(tx, **how):
    return jax.jit(segments.make_segment_step(LM_, tx, **how))


def test_a_row_stays_for_its_segments_and_then_gives_its_place(params):
    tx = optax.sgd(0.0)
    step, (state, carry) = step_of(tx, segments=2, explore=1.0), start(params, tx)
    seen = []
    for seed in (1, 2, 3):
        state, carry, metrics = step(state, carry, rows(seed))
        seen.append(np.asarray(carry.tokens_BxT))
        assert np.isfinite(float(metrics["loss"]))
    np.testing.assert_array_equal(seen[0], rows(1)["tokens"])
    np.testing.assert_array_equal(seen[1], seen[0])
    np.testing.assert_array_equal(seen[2], rows(3)["tokens"])
    np.testing.assert_array_equal(carry.ran_B, 1)


def test_segments_go_on_from_each_other(params):
    """Weights that do not move: two steps are the two segments that `solve` runs, and those are one
    model of twice the recursions."""
    tx = optax.sgd(0.0)
    step, (state, carry) = step_of(tx, segments=4, explore=1.0), start(params, tx)
    for _ in range(2):
        state, carry, _ = step(state, carry, rows(1))
    twice = LM_.at_depth(8)
    seg = jnp.ones_like(carry.tokens_BxT)

    @jax.jit
    def whole(p):
        h = twice.forward(p, carry.tokens_BxT, seg).h_BxTxD
        return h, LM_.leave(p, LM_.loop.read(carry.state_BxTxS), seg)

    want, got = whole(params)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_head_that_says_done_ends_a_row_early(params):
    tx = optax.sgd(0.0)
    sure = params | {"halt": params["halt"] | {"bias": jnp.full((1,), 50.0)}}
    step, (state, carry) = step_of(tx, segments=4, explore=0.0), start(sure, tx)
    _, carry, metrics = step(state, carry, rows(1))
    assert carry.done_B.all() and metrics["segments"] == 1
    step = step_of(tx, segments=4, explore=1.0)  # nobody may
    assert not step(state, segments.begin(LM_, rows(0)), rows(1))[1].done_B.any()


def test_early_segments_weigh_more_and_the_mean_follows(params):
    tx = optax.sgd(1e-2)
    average = jax.tree.map(jnp.copy, params)
    state, carry = start(params, tx, average)
    losses = {}
    for decay in (1.0, 0.5):
        step = step_of(tx, segments=2, halt_weight=0.0, explore=1.0, decay=decay, ema=0.9)
        new, _, metrics = step(state, carry, rows(1))
        losses[decay] = float(metrics["loss"])
    np.testing.assert_allclose(losses[0.5] / losses[1.0], 1 / 0.75, rtol=1e-5)
    kept = 1 / 10  # of the first step, whatever the decay
    for a, b, c in zip(
        *(jax.tree.leaves(t) for t in (new.average, average, new.params)), strict=True
    ):
        np.testing.assert_allclose(a, kept * b + (1 - kept) * c, atol=1e-6)


def test_it_learns_the_puzzles_it_is_shown(params):
    """Far below ln 4 at empty cells, which guessing has, on one batch; and it says which are
    right."""
    tx, same = optax.adam(1e-2), rows(1)
    step, (state, carry) = step_of(tx, segments=2, explore=1.0), start(params, tx)
    for _ in range(150):
        state, carry, metrics = step(state, carry, same)
    assert float(metrics["loss"]) < 0.7
    right, z = jax.jit(functools.partial(segments.solve, LM_, segments=2))(state.params, same)
    assert right.shape == z.shape == (2, 6)


def test_puzzles_have_one_solution_and_tests_have_grids_of_their_own():
    every = grids()
    assert every.shape == (288, CELLS) and len(np.unique(every, axis=0)) == 288
    train, test = puzzles(0, 200, clues=5), puzzles(1, 200, clues=5, held_out=True)
    for p in (train, test):
        digits = p.tokens_BxT - DIGITS * np.arange(CELLS)
        given = p.weights_BxT == 0
        assert (digits == np.where(given, p.answers_BxT, 0)).all() and given.sum(1).min() >= 5
        fits = [((every == d) | (d == 0)).all(axis=1).sum() for d in digits]
        assert set(fits) == {1}
    seen = {tuple(g) for g in train.answers_BxT}
    assert not seen & {tuple(g) for g in test.answers_BxT}
    again = puzzles(0, 200, clues=5)
    np.testing.assert_array_equal(again.tokens_BxT, train.tokens_BxT)
    with pytest.raises(ValueError, match="clues must be from 4 to 16"):
        puzzles(0, 1, clues=3)
