"""Blocks in a loop are the blocks unrolled: the same loss and gradients, whatever the model, its
keys and its executor; and the program does not grow with the number of layers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.config import RecursionConfig, check
from mor_jax.config.config import Config
from mor_jax.errors import ConfigError
from mor_jax.model.stack import FROM, in_loop
from mor_jax.train.loops import loop_loss
from mor_jax.train.step import gradients, loss_scales

TIED = {"sharing": "cycle", "layers": 4, "recursions": 2}
ENDS = TIED | {"layers": 8, "prelude": 2, "coda": 2}
# Each part is a loop of two blocks (vanilla: of three); every KV strategy and executor.
CASES = {
    "vanilla": ("vanilla", {"layers": 3, "remat": "block"}, {}),
    "in place": ("sequence", {"sharing": "sequence", "layers": 4, "recursions": 2}, {}),
    "expert": ("mor", ENDS | {"remat": "dots"}, {}),
    "expert, shared": ("mor_shared", TIED | {"remat": "block"}, {}),
    "expert, hybrid": ("mor_hybrid", TIED, {}),
    "token": ("token", TIED, {"buckets": 1}),
    "own norms and additions": ("mor", TIED | {"norms": "own", "lora_rank": 2}, {}),
}


def batch_of(length: int) -> dict[str, jax.Array]:
    seg = jnp.asarray([[1] * 4 + [2] * (length - 6) + [0] * 2, [1] * length], jnp.int32)
    tokens = np.random.default_rng(0).integers(0, 64, seg.shape)
    return {"tokens": jnp.asarray(tokens, jnp.int32) * (seg > 0), "segment_ids": seg}


def with_scan(lm, choice):
    return dataclasses.replace(lm, model=dataclasses.replace(lm.model, scan_layers=choice))


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32: sums in another order
        np.testing.assert_allclose(a, b, atol=2e-5 * max(float(jnp.max(jnp.abs(b))), 1e-3))


@pytest.mark.parametrize("case", CASES)
def test_a_loop_of_blocks_is_the_blocks_unrolled(case):
    kind, model, depth = CASES[case]
    lm, batch = small_lm(kind, context=14, width=16, mlp_width=24, **model), batch_of(14)
    lm = dataclasses.replace(lm, depth=dataclasses.replace(lm.depth, **depth))
    params = random_params(lm)

    @functools.partial(jax.jit, static_argnums=0)
    def run(lm, params):
        grads, aux = gradients(lm, params, batch, 1)
        return aux["loss"], grads

    equal(run(with_scan(lm, "on"), params), run(with_scan(lm, "off"), params))


@pytest.mark.parametrize("kind", ["mor_hybrid_first", "token_shared"])
def test_the_masked_executor_as_evaluation_runs_it(kind):
    lm, batch = small_lm(kind, context=14, width=16, mlp_width=24, **TIED), batch_of(14)
    params = random_params(lm)

    @functools.partial(jax.jit, static_argnums=0)
    def run(lm, params):
        out = lm.forward(params, batch["tokens"], batch["segment_ids"], mode="causal")
        return out.h_BxTxD, out.depth_BxT

    equal(run(with_scan(lm, "on"), params), run(with_scan(lm, "off"), params))


def test_steps_that_read_the_prelude_with_a_truncated_gradient():
    knobs = RecursionConfig(injection="concat", gradient_steps=1)
    lm = dataclasses.replace(small_lm("recursive", context=14, **TIED), recursion=knobs)
    assert lm.recursion.trains
    params, batch = random_params(lm), batch_of(14)
    scales = loss_scales(lm, batch)

    @functools.partial(jax.jit, static_argnums=0)
    def run(lm, params):
        return jax.value_and_grad(lambda p: loop_loss(lm, p, batch, scales)[0])(params)

    equal(run(with_scan(lm, "on"), params), run(with_scan(lm, "off"), params))


def test_the_program_does_not_grow_with_the_layers():
    def lines(layers, choice):
        lm = with_scan(small_lm("vanilla", context=14, layers=layers), choice)
        params = jax.eval_shape(lm.init, jax.random.key(0))
        made = jax.jit(lm.apply).lower(params, batch_of(14)["tokens"])
        return made.as_text().count("dot_general")

    assert lines(2, "on") == lines(4, "on") < lines(2, "off") < lines(4, "off")


def test_where_blocks_are_a_loop():
    assert in_loop("auto", FROM, "tpu", True) and not in_loop("auto", FROM - 1, "tpu", True)
    assert not in_loop("auto", 99, "cpu", True) and not in_loop("auto", 99, "gpu", True)
    assert not in_loop("auto", 99, "tpu", False) and not in_loop("off", 99, "tpu", True)
    assert in_loop("on", 2, "cpu", True) and not in_loop("on", 1, "tpu", True)


def test_a_first_block_with_a_factor_of_its_own_is_refused_by_name():
    lm = small_lm("mor_relaxed", scan_layers="on")
    with pytest.raises(ConfigError, match=r"scan_layers = 'on'.*recursion_encoding.*'auto' or"):
        check(Config("x", lm.model, lm.depth), devices=1)
    # left to itself it stays unrolled, on a TPU as well
    assert not in_loop("auto", FROM, "tpu", alike=not lm.model.recursion_encoding)
