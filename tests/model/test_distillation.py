"""The distillation loss against its plain definition; what a teacher does to the gradient of a
step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.model.loss import Mix, cross_entropy_sum, distilled_sum
from mor_jax.train.distill import Teacher
from mor_jax.train.step import gradients, loss_fn, loss_scales

TINY = {"width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 12, "loss_chunk": 5}
B, T, D, E, V = 2, 7, 6, 4, 11


def cap(x):
    return 3 * jnp.tanh(x / 3)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    weights = jnp.asarray([[1, 0, 0.5, 1, -2, 0, 1], [1] * 4 + [0] * 3], jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)).astype(np.int32))
    return draw(B, T, D), draw(V, D), targets, weights, draw(B, T, E), draw(V, E)


def plain(h, table, targets, weights, teacher_h, teacher_table, mix):
    """The definition, on all logits at once."""
    logits, taught = mix.finish(h @ table.T), mix.teacher_finish(teacher_h @ teacher_table.T)
    nll = (
        -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] @ weights.T
    )
    p, q = (jax.nn.softmax(x / mix.temperature) for x in (taught, logits))
    kl = jnp.sum(p * jnp.log(p / q), axis=-1)
    nll, distillation = jnp.trace(nll), mix.temperature**2 * jnp.sum(kl * jnp.clip(weights, 0))
    return (1 - mix.weight) * nll + mix.weight * distillation, nll, distillation


@pytest.mark.parametrize(
    "mix",
    [Mix(0.3, 1.0), Mix(0.7, 2.0, 3, cap, cap), Mix(1.0, 0.5, 7)],
    ids=lambda mix: f"weight {mix.weight}, chunk {mix.chunk}",
)
def test_it_is_its_definition_in_value_and_gradient(arrays, mix):
    both = [
        jax.jit(
            jax.value_and_grad(
                lambda *a, f=f: (lambda r: (r[0], r))(f(*a, mix)), argnums=(0, 1), has_aux=True
            )
        )
        for f in (distilled_sum, plain)
    ]
    ((_, sums), grads), ((_, wanted), wanted_grads) = (run(*arrays) for run in both)
    np.testing.assert_allclose(sums, wanted, rtol=1e-5)
    np.testing.assert_allclose(distilled_sum(*arrays, mix), wanted, rtol=1e-5)  # without a gradient
    for found, want in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_a_weight_of_zero_is_the_next_token_loss(arrays):
    h, table, targets, weights, *_ = arrays
    found = jax.grad(lambda h: distilled_sum(h, *arrays[1:], Mix(0.0, 1.0))[0])(h)
    wanted = jax.grad(lambda h: cross_entropy_sum(h, table, targets, weights))(h)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    seg = np.tile([1] * 5 + [2] * 5 + [0] * 2, (4, 1)).astype(np.int32)
    return {
        "tokens": jnp.asarray(rng.integers(0, 64, seg.shape).astype(np.int32)),
        "segment_ids": jnp.asarray(seg),
    }


def test_a_model_learns_nothing_from_itself(batch):
    lm = small_lm("vanilla", **TINY, layers=1)
    params = random_params(lm)
    grads, aux = jax.jit(lambda p, b: gradients(lm, p, b, 1, objective=Teacher(lm, params, 1.0)))(
        params, batch
    )
    assert float(aux["distill_loss"]) == pytest.approx(0.0, abs=1e-6)
    assert float(aux["lm_loss"]) > 1
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-6


def test_accumulation_counts_the_teacher_the_same(batch):
    """In two micro-batches with row sizes chosen before the recursion, against one with all tokens
    computed."""
    lm = small_lm("token", **TINY, layers=2, recursions=2, sharing="cycle")
    lm = dataclasses.replace(
        lm, depth=dataclasses.replace(lm.depth, buckets=2, balance_loss_weight=0.0)
    )
    other = small_lm("vanilla", **TINY | {"width": 24, "heads": 3}, layers=1)
    params, theirs = random_params(lm), random_params(other, 1)

    def plain(p, t, b):
        teacher = Teacher(other, t, 0.5, 2.0)

        def run(p):
            return loss_fn(
                lm, p, teacher.teach(b), loss_scales(lm, b), None, teacher, executor="masked"
            )

        return jax.grad(run, has_aux=True)(p)

    two = jax.jit(lambda p, t, b: gradients(lm, p, b, 2, objective=Teacher(other, t, 0.5, 2.0)))
    (found, aux), (wanted, more) = (run(params, theirs, batch) for run in (two, jax.jit(plain)))
    assert float(aux["loss"]) == pytest.approx(
        0.5 * float(aux["lm_loss"] + aux["distill_loss"]), rel=1e-5
    )
    for name in ("lm_loss", "distill_loss"):
        assert float(aux[name]) == pytest.approx(float(more[name]), rel=1e-5)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            mine, theirs, atol=1e-5 * max(1e-3, float(jnp.abs(theirs).max()))
        )
