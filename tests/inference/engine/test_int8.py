"""8-bit weights: how far from the original, how many bytes, and that an engine with them computes
what a model with the rounded weights computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from driving import Job, expected, play, prompts
from small import random_params, small_lm, spread_routers

from mor_jax.inference.engine import layers
from mor_jax.inference.engine.device import Device, EngineConfig


def test_no_weight_moves_further_than_half_a_step():
    """Whatever the sizes of the outputs, zero included."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(400, 33)) * 10.0 ** rng.integers(-20, 20, (400, 1))
    w[rng.random(400) < 0.1] = 0
    w = w.astype(np.float32)
    q = layers.quantize(jnp.asarray(w))
    step = np.abs(w).max(axis=1, keepdims=True) / 127
    # half a step, and the rounding of the division and of the product
    assert np.all(np.abs(np.asarray(layers.dequantize(q)) - w) <= step * (0.5 + 1e-4))
    assert q.q.dtype == jnp.int8 and q.scale.shape == (400, 1)


@pytest.mark.parametrize("contract", [1, 3])
def test_a_product_is_that_with_the_rounded_matrix(contract):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(6, 2, 3, 4)[: 1 + contract]), jnp.float32)
    x = jnp.asarray(rng.normal(size=(5, *w.shape[1:])), jnp.float32)
    q = layers.quantize(w, contract)
    y = layers.dense(x, layers.dequantize(q), contract)
    np.testing.assert_allclose(layers.dense(x, q, contract), y, rtol=1e-4, atol=1e-5)


SHAPE = dict(width=64, mlp_width=96, context=32, tied=False, layers=3, recursions=2)
SHAPE |= dict(sharing="cycle", prelude=1)


def test_an_engine_computes_with_the_rounded_weights_in_a_quarter_of_the_bytes():
    """Shared keys: queries alone are projected after the first step."""
    lm = small_lm("mor_shared", **SHAPE)
    params = spread_routers(random_params(lm))
    sizes = {"lanes": 2, "chunks": (8,), "full_lanes": 2, "boundary_every": 1, "max_logprobs": 1}
    jobs = [Job(p, 6, i) for i, p in enumerate(prompts(0, 9, 4))]

    device = Device(lm, params, EngineConfig(weights="int8", **sizes))
    device.warm_up()
    device.params = layers.rounded(params)  # what `expected` computes with
    played = play(device, jobs)
    for done, (tokens, depths) in zip(played, expected(device, jobs, played, 32), strict=True):
        assert done.tokens == tokens and done.depths == depths

    def held(tree):
        return sum(
            x.nbytes
            for name, part in tree.items()
            if name != "router"
            for x in jax.tree.leaves(part)
        )

    # a byte for four, and a factor of four bytes for 64 or 96 of them; norms stay
    assert held(device.weights) < 0.3 * held(params)
