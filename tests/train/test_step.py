"""One optimiser step: accumulation, loss, clipping, decay, schedules, and what happens to numbers
that are not finite."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import random_params, small_lm

from mor_jax.config import OptimConfig
from mor_jax.model.loss import cross_entropy_sum, next_token_targets, token_nll
from mor_jax.train import step as step_module
from mor_jax.train.schedule import learning_rate, optimizer
from mor_jax.train.state import TrainState
from mor_jax.train.step import gradients, make_train_step

TINY = {"width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 32}


def ragged_batch(
    rows: int = 4, length: int = 32, vocab: int = 64, seed: int = 0
) -> dict[str, jax.Array]:
    """One full row, one of three documents with a padded end, one row of padding only, short
    rows."""
    rng = np.random.default_rng(seed)
    seg = np.zeros((rows, length), np.int32)
    seg[0] = 1
    seg[1, :9], seg[1, 9:11], seg[1, 11:25] = 1, 2, 3
    seg[3:, :5] = 1  # row 2 stays empty
    tokens = rng.integers(0, vocab, size=seg.shape, dtype=np.int32) * (seg > 0)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(seg)}


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


@pytest.fixture(scope="module")
def accumulated():
    """Gradients and metrics of one batch under 1, 2 and 4 micro-batches."""
    lm = small_lm("mor", layers=3, sharing="cycle", **TINY)
    params = random_params(lm)
    bytes_V = jnp.arange(64, dtype=jnp.int32) % 5
    run = jax.jit(lambda accum, p, b: gradients(lm, p, b, accum, bytes_V), static_argnums=0)
    return lm, params, {accum: run(accum, params, ragged_batch()) for accum in (1, 2, 4)}


@pytest.mark.parametrize("accum", [2, 4])
def test_accumulation_changes_nothing(accumulated, accum):
    """With rows of unequal length, and one micro-batch of padding only, every term of the loss
    stays what it was."""
    _, _, found = accumulated
    (grads, aux), (whole_grads, whole) = found[accum], found[1]
    for name in ("loss", "lm_loss", "router_loss", "nll", "bytes", "tokens", "depth_sum"):
        assert relative(aux[name], whole[name]) < 1e-5, name
    for name, mine, theirs in zip(
        whole["router"]._fields, aux["router"], whole["router"], strict=True
    ):
        assert relative(mine, theirs) < 1e-5, name
    leaves = jax.tree_util.tree_leaves_with_path(whole_grads)
    for (path, theirs), mine in zip(leaves, jax.tree.leaves(grads), strict=True):
        assert relative(mine, theirs) < 1e-5, jax.tree_util.keystr(path)


def test_loss_is_the_mean_over_real_targets(accumulated):
    """Against plain log-softmax of the logits, and the router's gradient is there."""
    lm, params, found = accumulated
    grads, aux = found[1]
    batch = ragged_batch()
    logp = jax.nn.log_softmax(jax.jit(lm.apply)(params, batch["tokens"], batch["segment_ids"]))
    targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"])
    nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    assert float(weights.sum()) == 31 + 8 + 1 + 13 + 4
    assert relative(aux["lm_loss"], jnp.sum(nll * weights) / jnp.sum(weights)) < 1e-5
    assert (
        relative(aux["loss"], aux["lm_loss"] + lm.depth.aux_loss_weight * aux["router_loss"]) < 1e-6
    )
    assert float(aux["bytes"]) == float(jnp.sum((targets % 5) * weights))
    assert float(aux["router_loss"]) > 0
    moved = {name for name, g in grads["router"].items() if np.abs(np.asarray(g)).max() > 0}
    assert moved == set(grads["router"]) - {"survey"}  # which is kept by rule


# ---------------------------------------------------------------- cross entropy


@pytest.mark.parametrize("chunk", [0, 1, 5, 8, 13, 64])
def test_chunked_cross_entropy_is_the_plain_one(chunk):
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(3, 13, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 20, size=(3, 13)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, size=(3, 13)), jnp.float32) * 0.7

    def plain_nll(h, table):
        logp = jax.nn.log_softmax(h @ table.T)
        return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    def plain(h, table):
        return jnp.sum(plain_nll(h, table) * weights)

    def chunked(h, table):
        return cross_entropy_sum(h, table, targets, weights, chunk)

    # Scaled, so that the cotangent is not 1.
    value, grads = jax.value_and_grad(lambda *a: 3 * chunked(*a), argnums=(0, 1))(h, table)
    want, want_grads = jax.value_and_grad(lambda *a: 3 * plain(*a), argnums=(0, 1))(h, table)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for mine, theirs in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    # not differentiated: another path
    np.testing.assert_allclose(chunked(h, table), want / 3, rtol=1e-6)
    np.testing.assert_allclose(
        token_nll(h, table, targets, chunk), plain_nll(h, table), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("chunk", [0, 16, 4])
def test_cross_entropy_in_bfloat16_compiles_for_any_number_of_chunks(chunk):
    """One chunk is no loop to the compiler, which has other ways with its products then."""
    h, table = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 16, 32), (64, 32)])
    )
    targets, weights = jnp.ones((2, 16), jnp.int32), jnp.ones((2, 16))
    gradient = jax.jit(
        jax.grad(
            lambda h, table: cross_entropy_sum(h, table, targets, weights, chunk), argnums=(0, 1)
        )
    )
    exact = (
        h.astype(jnp.bfloat16).astype(jnp.float32),
        table.astype(jnp.bfloat16).astype(jnp.float32),
    )
    for half, full in zip(gradient(h.astype(jnp.bfloat16), table), gradient(*exact), strict=True):
        # Probabilities, and the states' gradient, are rounded to 8 bits.
        np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=0.03, atol=0.03)


def test_cross_entropy_in_bfloat16_keeps_what_a_sure_prediction_has_left_to_learn():
    """At a target's probability of 0.999 the gradient is what 1 leaves: it must not drown in the
    rounding of 0.999."""
    width = 16
    # row i points along axis i; exact in bfloat16
    table = 4 * jnp.eye(32, width, dtype=jnp.float32)
    targets = jnp.arange(8, dtype=jnp.int32)[None]
    h = 2.5 * jax.nn.one_hot(targets, width, dtype=jnp.float32)
    weights = jnp.ones(targets.shape, jnp.float32)
    gradient = jax.grad(
        lambda h, table: cross_entropy_sum(h, table, targets, weights, 4), argnums=(0, 1)
    )
    want = gradient(h, table)
    assert float(jnp.max(jax.nn.softmax(h @ table.T))) > 0.998
    for half, full in zip(gradient(h.astype(jnp.bfloat16), table), want, strict=True):
        np.testing.assert_allclose(half.astype(jnp.float32), full, rtol=0.02, atol=1e-6)


# ---------------------------------------------------------------- schedules and the optimiser


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_schedules(schedule, steps):
    config = OptimConfig(schedule=schedule, peak_lr=2e-3, warmup=0.05, decay=0.2, final_lr=0.1)
    rates = np.array([learning_rate(config, steps)(s) for s in range(steps + 1)])
    warmup = round(0.05 * steps)
    during = rates[:steps]  # what the steps use
    assert np.all(during > 0) and np.all(during <= 2e-3 * (1 + 1e-6))
    assert np.isclose(during.max(), 2e-3, rtol=1e-5)
    assert np.all(np.diff(rates[: warmup + 1]) >= -1e-9) and np.all(
        np.diff(rates[max(warmup, 1) :]) <= 1e-9
    )
    if warmup:
        assert np.isclose(rates[0], 2e-3 / warmup)
    if steps >= 7:  # else 20 % of the run are no step
        assert np.isclose(rates[steps], 2e-3 if schedule == "constant" else 2e-4, rtol=1e-4)
    if schedule == "wsd" and steps >= 100:
        flat = rates[warmup : steps - round(0.2 * steps) + 1]
        np.testing.assert_allclose(flat, 2e-3, rtol=1e-6)
        cool = np.diff(rates[steps - round(0.2 * steps) :])
        np.testing.assert_allclose(cool, cool[0], rtol=1e-3)  # a straight line


@pytest.fixture(scope="module")
def toy():
    """A parameter tree with the names of the real one."""
    lm = small_lm("mor", layers=5, **TINY)
    return random_params(lm)


def test_weight_decay_spares_norms(toy):
    tx = optimizer(OptimConfig(schedule="constant", peak_lr=0.1, warmup=0.0, weight_decay=0.5), 10)
    zeros = jax.tree.map(jnp.zeros_like, toy)
    updates, _ = tx.update(zeros, tx.init(toy), toy)
    norms = matrices = 0
    for (path, w), u in zip(
        jax.tree_util.tree_leaves_with_path(toy), jax.tree.leaves(updates), strict=True
    ):
        if path[-1].key == "survey":  # kept by rule
            assert not np.any(u)
        elif w.ndim == 1:  # a norm's scale
            norms += 1
            assert not np.any(u), jax.tree_util.keystr(path)
        else:
            matrices += 1
            np.testing.assert_allclose(u, -0.1 * 0.5 * w, rtol=1e-5)
    assert norms == 2 * 3 + 1 and matrices > norms


@pytest.mark.parametrize(("clip", "kept"), [(1.0, 1.0), (0.0, None), (1e6, None)])
def test_clipping(toy, clip, kept):
    """The first moment after one step is (1 - b1) times the gradient that came through."""
    config = OptimConfig(clip_norm=clip)
    tx = optimizer(config, 10)
    grads = jax.tree.map(lambda w: 100 * w, toy)
    _, state = tx.update(grads, tx.init(toy), toy)
    moment = optax.tree_utils.tree_get(state, "mu")
    expected = kept or float(optax.global_norm(grads))
    assert np.isclose(float(optax.global_norm(moment)), (1 - config.b1) * expected, rtol=1e-4)


# ---------------------------------------------------------------- the step


@pytest.fixture(scope="module")
def vanilla():
    lm = small_lm("vanilla", layers=1, **TINY)
    tx = optimizer(OptimConfig(clip_norm=1e-3, peak_lr=1e-2), 10)
    step = jax.jit(make_train_step(lm, tx, accum=2), donate_argnums=0)

    def state():
        params = random_params(lm)
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

    return lm, step, state


def test_step_learns_counts_and_donates(vanilla):
    lm, step, fresh = vanilla
    state, batch = fresh(), ragged_batch()
    raw = jax.jit(lambda p, b: gradients(lm, p, b, 1)[0])(state.params, batch)
    norm = float(optax.global_norm(raw))
    losses = []
    with warnings.catch_warnings():
        # "Some donated buffers were not usable"
        warnings.filterwarnings("error", message=".*donated.*")
        for count in range(1, 6):
            before = state
            state, metrics = step(state, batch)
            assert int(state.step) == count
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
            losses.append(float(metrics["loss"]))
            if count == 1:
                # before clipping, which is at 1e-3
                assert np.isclose(float(metrics["grad_norm"]), norm, rtol=1e-4)
    assert norm > 1e-3
    assert losses[-1] < losses[0]
    assert float(metrics["mean_depth"]) == 1.0
    assert not any(name.startswith("router/") for name in metrics)


def test_poisoned_weights_are_reported_and_kept(vanilla):
    """A step from weights that are not finite changes nothing: neither counter, nor moments, nor
    weights."""
    _, step, fresh = vanilla
    state = fresh()
    table = state.params["embed"]["table"].at[3, 0].set(jnp.nan)
    state = state._replace(params=state.params | {"embed": {"table": table}})
    before = jax.tree.map(np.asarray, state)
    after, metrics = step(state, ragged_batch())
    assert not np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after))


@pytest.mark.parametrize(
    ("loss", "gradient", "goes_on"),
    [
        (1.0, 2.0, True),
        (np.nan, 2.0, False),
        (np.inf, 2.0, False),
        (1.0, np.nan, False),
        (1.0, -np.inf, False),
    ],
)
def test_each_kind_of_non_finite_number_stops_the_update(
    vanilla, monkeypatch, loss, gradient, goes_on
):
    lm, _, _ = vanilla
    params = {"w": jnp.ones((2, 2)), "scale": jnp.ones(2), "router": {}}
    aux = dict.fromkeys(
        ("loss", "lm_loss", "router_loss", "router_z_loss", "depth_sum", "tokens", "nll", "bytes"),
        jnp.float32(loss),
    )
    grads = jax.tree.map(jnp.ones_like, params)
    grads["w"] = grads["w"].at[0, 1].set(gradient)
    monkeypatch.setattr(step_module, "gradients", lambda *_: (grads, aux | {"router": None}))
    tx = optimizer(OptimConfig(), 10)
    state = TrainState(jnp.int32(4), params, tx.init(params))
    new, metrics = make_train_step(lm, tx)(state, ragged_batch())
    same = [
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True)
    ]
    assert not any(same) if goes_on else all(same)
    assert int(new.step) == (5 if goes_on else 4)
    assert (
        bool(np.isfinite(float(metrics["loss"])) and np.isfinite(float(metrics["grad_norm"])))
        == goes_on
    )
