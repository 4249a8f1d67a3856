"""Backward passes that are written out equal automatic differentiation of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from mor_jax import nn
from mor_jax.nn.mlp import swiglu
from mor_jax.nn.norm import rms_norm

EPS = 1e-5


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * scale


def plain_swiglu(h):
    return h[:, :, 0] / (1 + jnp.exp(-h[:, :, 0])) * h[:, :, 1]


CASES = {
    "norm": (
        lambda x, scale: rms_norm(x, scale, EPS),
        plain_norm,
        (draw(0, 2, 5, 12), draw(1, 12)),
    ),
    "norm of tiny rows": (
        lambda x, scale: rms_norm(x, scale, EPS),
        plain_norm,
        (1e-3 * draw(0, 2, 5, 12), draw(1, 12)),
    ),
    "swiglu": (swiglu, plain_swiglu, (3 * draw(2, 2, 5, 2, 12),)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_gradients(case, dtype, tolerance):
    mine, plain, (x, *others) = CASES[case]
    x = x.astype(dtype)
    y, pull = jax.vjp(mine, x, *others)
    want_y, want_pull = jax.vjp(plain, x.astype(jnp.float32), *others)
    dy = draw(3, *y.shape).astype(dtype)
    assert y.dtype == x.dtype
    for got, want in zip((y, *pull(dy)), (want_y, *want_pull(dy.astype(jnp.float32))), strict=True):
        error = float(jnp.max(jnp.abs(got.astype(jnp.float32) - want)))
        assert error <= tolerance * float(jnp.max(jnp.abs(want)))


@pytest.mark.parametrize("kind", ["mlp", "wide_mlp"])
def test_mlp_routers_use_the_exact_gelu(kind):
    """The released router calls torch's default GELU, x * Phi(x); the tanh form differs by up to
    5e-4."""
    x_BxTxD = 2 * draw(4, 2, 3, 8)
    module = nn.Router(kind, 2, 0.7)
    params = nn.init(module, jax.random.key(0), x_BxTxD)
    hidden = np.asarray(x_BxTxD @ params["hidden"].T, np.float64)
    want = (hidden * (1 + special.erf(hidden / np.sqrt(2))) / 2) @ np.asarray(
        params["kernel"].T, np.float64
    )
    np.testing.assert_allclose(nn.apply(module, params, x_BxTxD), want, atol=2e-5)
