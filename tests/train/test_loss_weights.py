"""Loss weights of conversations: exact in gradients, metrics, accumulation, packing and
evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.model.loss import next_token_targets
from mor_jax.train import evaluate as evaluate_module
from mor_jax.train import step as step_module
from mor_jax.train.step import gradients

TINY = {"width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 32}
LENGTH = 24
# Two conversations: where they lie in a packed row, and which of their tokens have a loss.
PARTS = {
    1: (slice(0, 10), [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]),
    2: (slice(10, 21), [0, 0, 0.5, 0.5, 0, 0, 0, 0, -2, -2, 1]),
}


def packed(seed: int = 0) -> dict[str, jax.Array]:
    """One row with both conversations and padding."""
    tokens = np.random.default_rng(seed).integers(0, 64, (1, LENGTH)).astype(np.int32)
    seg, weights = np.zeros((1, LENGTH), np.int32), np.zeros((1, LENGTH), np.float32)
    for segment, (place, own) in PARTS.items():
        seg[0, place], weights[0, place] = segment, own
    return {
        "tokens": jnp.asarray(tokens),
        "segment_ids": jnp.asarray(seg),
        "weights": jnp.asarray(weights),
    }


def unpacked() -> dict[str, jax.Array]:
    """The same conversations, a row each."""
    rows = []
    for place, _ in PARTS.values():
        row = {name: np.zeros(LENGTH, x.dtype) for name, x in packed().items()}
        for name, x in packed().items():
            row[name][: place.stop - place.start] = np.asarray(x[0, place])
        row["segment_ids"] = np.minimum(row["segment_ids"], 1)
        rows.append(row)
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@pytest.fixture(scope="module", params=["vanilla", "token"])
def model(request):
    shape = (
        {"layers": 1, "sharing": "none"}
        if request.param == "vanilla"
        else {"layers": 3, "sharing": "cycle"}
    )
    lm = small_lm(request.param, **TINY, **shape)
    # The balance loss is one of the micro-batch as a whole, not a sum over tokens.
    if lm.depth.routed:
        lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, balance_loss_weight=0.0))
    return lm, random_params(lm), jax.jit(lambda p, b, n: gradients(lm, p, b, n), static_argnums=2)


def assert_close(found, wanted, tolerance=2e-5):
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            mine, theirs, atol=tolerance * max(1e-3, float(np.abs(theirs).max()))
        )


def test_the_loss_is_the_weighted_sum_over_the_number_of_weighted_targets(model):
    lm, params, run = model
    batch = packed()
    _, aux = run(params, batch, 1)
    logp = jax.nn.log_softmax(lm.apply(params, batch["tokens"], batch["segment_ids"]))[0]
    own = np.concatenate([w for _, w in PARTS.values()])
    # position 10 opens the second conversation
    at = [t for t in range(1, 21) if own[t] and t != 10]
    want = sum(own[t] * -float(logp[t - 1, batch["tokens"][0, t]]) for t in at) / len(at)
    assert float(aux["lm_loss"]) == pytest.approx(want, rel=1e-5)
    assert float(aux["bytes"]) == len(at)


def test_no_gradient_hangs_on_a_target_without_weight(model, monkeypatch):
    lm, params, run = model
    wanted, _ = run(params, packed(), 1)

    def other_targets(tokens, seg, weights=None):
        targets, weights = next_token_targets(tokens, seg, weights)
        return jnp.where(weights == 0, (targets + 17) % 64, targets), weights

    monkeypatch.setattr(step_module, "next_token_targets", other_targets)
    found, _ = jax.jit(lambda p, b: gradients(lm, p, b, 1))(params, packed())
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_packed_is_unpacked(model):
    """Of policies that look at each token alone; expert-choice selects over the row."""
    _, params, run = model
    (one, aux), (two, other) = run(params, packed(), 1), run(params, unpacked(), 1)
    assert float(aux["lm_loss"]) == pytest.approx(float(other["lm_loss"]), rel=1e-5)
    assert_close(one, two)


def test_accumulation_counts_the_same(model):
    _, params, run = model
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), packed(), packed(3))
    (one, aux), (two, other) = run(params, both, 1), run(params, both, 2)
    assert float(aux["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
    assert_close(one, two)


def test_weights_of_one_are_no_weights(model):
    _, params, run = model
    batch = packed()
    plain = {name: x for name, x in batch.items() if name != "weights"}
    (one, aux), (two, other) = (
        run(params, batch | {"weights": jnp.ones((1, LENGTH))}, 1),
        run(params, plain, 1),
    )
    assert float(aux["loss"]) == float(other["loss"])
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_evaluation_reads_the_tokens_with_a_loss(model):
    lm, params, _ = model
    batch, bytes_V = packed(), jnp.ones(64)
    sums = evaluate_module.eval_step(lm, params, batch, bytes_V, "causal")
    targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"], batch["weights"])
    logp = jax.nn.log_softmax(
        lm.apply(params, batch["tokens"], batch["segment_ids"], mode="causal")
    )
    nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    assert float(sums["targets"]) == float(jnp.sum(weights > 0)) == 8
    assert float(sums["nll"]) == pytest.approx(float(jnp.sum(nll * (weights > 0))), rel=1e-5)
