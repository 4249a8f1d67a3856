"""The splash kernel in interpret mode equals the plain masked softmax, gradients included; what it
cannot run is named.

tests/parallel/test_tpu_compile.py compiles it for TPUs.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm
from test_attention import example, run, run_some

from mor_jax.errors import ConfigError
from mor_jax.kernels import splash
from mor_jax.nn.attention import choose
from mor_jax.train.step import loss_fn, loss_scales

module = sys.modules["mor_jax.nn.attention"]  # the package exports the function of the same name


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """As on a TPU, by plain JAX operations; blocks small enough that short rows have several."""
    kernel = functools.partial(module._splash_attention, interpret=True)
    monkeypatch.setitem(module._IMPLEMENTATIONS, "splash", kernel)
    monkeypatch.setattr(module, "backend", lambda: "tpu")
    monkeypatch.setattr(splash, "BLOCK", 128)
    jax.clear_caches()  # functions of other tests, traced for another backend
    yield
    jax.clear_caches()


@pytest.mark.parametrize("length", [5, 300])  # one padded block; three, the last padded
def test_rows_equal_plain(length):
    args = example(length)
    for got, want in zip(
        jax.jit(run, static_argnums=0)("splash", *args), run("xla", *args), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=3e-5)  # float32, another order of sums


@pytest.mark.parametrize(
    "picked", [range(150, 300), range(150), range(0, 300, 2), [*range(75), *range(225, 300)]]
)
def test_some_queries_and_all_keys_equal_plain(picked):
    """Shared keys: the queries of tokens that go on, wherever in the row they lie."""
    args = jnp.asarray(list(picked)), *example(300)[:5]
    for got, want in zip(run_some("splash", *args), run_some("xla", *args), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)


def test_picked_rows_are_causal_in_their_own_order():
    """Recursion-wise keys: a subset kept in row order, whose segments and places are picked
    along."""
    q, k, v, pos, seg, _, active = example(300)
    at = jnp.asarray(np.flatnonzero(active[0])[:170])

    def some(x, axis):
        return jnp.take(x, at, axis=axis)

    q, k, v, pos, seg = some(q, 3), some(k, 2), some(v, 2), some(pos, 1), some(seg, 1)
    args = (q, k, v, pos, seg, seg, np.ones(seg.shape, bool))
    for got, want in zip(run("splash", *args), run("xla", *args), strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)


def test_bfloat16_is_within_its_rounding():
    """Three roundings to 8 bits (of q * scale, of the output and of the cotangent), of sums of a
    few hundred terms."""
    *floats, pos, seg, kv_seg, active = example(300, head_dim=16)
    args = (*(x.astype(jnp.bfloat16) for x in floats), pos, seg, kv_seg, active)
    for got, want in zip(run("splash", *args), run("xla", *args), strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        assert got.dtype == want.dtype and np.max(np.abs(got - want)) <= 3 * 2**-8 * np.max(
            np.abs(want)
        )


@pytest.mark.parametrize("kind", ["vanilla", "mor", "mor_shared", "mor_hybrid", "token_hybrid"])
def test_a_model_of_every_kind_of_keys_learns_the_same(kind):
    shape = (
        {"layers": 2} if kind == "vanilla" else {"layers": 3, "recursions": 3, "sharing": "cycle"}
    )
    lm = small_lm(kind, context=40, **shape)
    params, rng = random_params(lm), np.random.default_rng(0)
    seg = np.array([[1] * 11 + [2] * 25 + [0] * 4, [1] * 40], np.int32)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 64, seg.shape), jnp.int32) * (seg > 0),
        "segment_ids": seg,
    }
    scales = loss_scales(lm, batch)

    def gradient(impl):
        this = dataclasses.replace(lm, model=dataclasses.replace(lm.model, attention=impl))
        # one row size that holds every token: several are chosen outside of a gradient
        if kind == "token_hybrid":
            this = dataclasses.replace(this, depth=dataclasses.replace(this.depth, buckets=1))
        return jax.jit(jax.value_and_grad(lambda p: loss_fn(this, p, batch, scales)[0]))(params)

    (loss, grads), (plain, of_plain) = gradient("splash"), gradient("xla")
    assert float(loss) == pytest.approx(float(plain), abs=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(of_plain), strict=True):
        scale = max(float(jnp.max(jnp.abs(want))), 1e-3)
        # float32 sums in another order, through all steps
        np.testing.assert_allclose(got, want, atol=1e-4 * scale)


# ---------------------------------------------------------------- what can run where


@pytest.mark.parametrize(
    ("impl", "backend", "dtype", "head_dim", "says"),
    [
        (
            "splash",
            "cpu",
            "bfloat16",
            64,
            r"'splash' runs on TPUs, and this is a CPU\. Use 'auto'.*here 'blocked'",
        ),
        (
            "splash",
            "gpu",
            "bfloat16",
            64,
            r"'splash' runs on TPUs, and this is a GPU\. Use 'auto'.*here 'blocked'",
        ),
        ("splash", "tpu", "float16", 64, "'splash' runs in bfloat16 and float32, not in float16"),
        (
            "splash",
            "tpu",
            "bfloat16",
            100,
            "multiple of 8 values up to 128 and of 128 above, not of 100",
        ),
        (
            "cudnn",
            "tpu",
            "bfloat16",
            64,
            r"'cudnn' runs on NVIDIA GPUs, and this is a TPU.*here 'splash'",
        ),
        (
            "cudnn",
            "gpu",
            "float32",
            64,
            r"'cudnn' runs in bfloat16, not in float32.*here 'blocked'",
        ),
        ("cudnn", "gpu", "bfloat16", 160, "up to 128, not of 160"),
        ("flash9", "tpu", "bfloat16", 64, "'flash9'. Valid: auto, xla, blocked, cudnn, splash"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(impl, backend, dtype, head_dim, says):
    with pytest.raises(ConfigError, match=says):
        choose(impl, backend, dtype, head_dim)


def test_auto_is_what_the_backend_can_run():
    assert (
        choose("auto", "tpu", "bfloat16", 64) == "splash"
        and choose("auto", "tpu", "bfloat16", 100) == "blocked"
    )
    assert (
        choose("auto", "gpu", "bfloat16", 128) == "blocked" == choose("auto", "cpu", "bfloat16", 64)
    )
    assert all(choose(impl, "tpu", "float32", 64) == impl for impl in ("xla", "blocked", "splash"))
