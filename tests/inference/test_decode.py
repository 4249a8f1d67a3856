"""Cached decoding equals the full causal forward pass, and the cache holds what ran and nothing
else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import KINDS, MORE_KV, ROUTED
from small import random_params, small_lm, spread_routers

from mor_jax.inference.decode import decode_step, prefill

TOLERANCE = 1e-4  # float32 logits of order 10: other shapes, other summation order
NEW = 210


def kept_entries(lm, active_RxBxT):
    """Which tokens each stream of the core holds, by strategy."""
    everyone = np.ones_like(active_RxBxT)
    kept = {
        "recursion_wise": active_RxBxT,
        "full": everyone,
        "hybrid": everyone,
        "hybrid_first": everyone,
    }
    return (kept | {"shared": everyone[:1]})[lm.depth.kv_name]


@pytest.mark.parametrize("kind", [*KINDS, *MORE_KV])
def test_decode_equals_the_full_forward_pass(kind):
    context = 256
    lm = small_lm(kind, context=context, vocab_size=128)
    params = spread_routers(random_params(lm))
    tokens = jax.random.randint(jax.random.key(1), (3, context), 0, 128)
    full = jax.jit(lambda p: lm.forward(p, tokens, mode="causal"))(params)
    want = np.asarray(lm.logits(params, full.h_BxTxD))
    depth, active = np.asarray(full.depth_BxT), np.asarray(full.active_RxBxT)
    # the routing must have something to get wrong; a router asked before step 1 can say depth 0
    if kind in ROUTED:
        from_zero = "survey" in params["router"] and not lm.depth.at_once
        assert len(np.unique(depth)) == lm.program.recursions + from_zero

    lengths = np.array([7, 25, 40])
    rows = np.arange(3)
    logits, cache, prompt_depth = jax.jit(prefill, static_argnums=(0, 4))(
        lm, params, tokens[:, :40], jnp.asarray(lengths), context
    )
    np.testing.assert_allclose(logits, want[rows, lengths - 1], atol=TOLERANCE)
    for b, n in enumerate(lengths):
        np.testing.assert_array_equal(prompt_depth[b, :n], depth[b, :n])

    step = jax.jit(functools.partial(decode_step, lm), donate_argnums=1)
    for i in range(NEW):
        at = lengths + i
        before = cache
        logits, cache, d = step(params, cache, tokens[rows, at])
        np.testing.assert_allclose(logits, want[rows, at], atol=TOLERANCE)
        np.testing.assert_array_equal(d, depth[rows, at])
    assert all(x.is_deleted() for x in jax.tree.leaves(before)), (
        "the old cache was copied, not reused"
    )

    seen = np.arange(context)[None] < (lengths + NEW)[:, None]
    kept = kept_entries(lm, active)
    np.testing.assert_array_equal(cache.entries_RxB(), (kept & seen).sum(-1))
    # positions kept with the keys are those of the tokens kept there
    for r, stream in enumerate(cache.core):
        for b in rows:
            n = int(stream.length_B[b])
            np.testing.assert_array_equal(
                stream.pos_BxS[b, :n], np.flatnonzero(kept[r, b] & seen[b])
            )


def test_a_halted_token_takes_no_room(kind):
    """Entries per depth: fewer and fewer where each depth keeps its own tokens, everyone's else;
    and once, not at each depth, where keys are shared."""
    lm = small_lm(kind)
    params = spread_routers(random_params(lm))
    tokens = jax.random.randint(jax.random.key(3), (2, 40), 0, 64)
    _, cache, depth = jax.jit(prefill, static_argnums=(0, 4))(
        lm, params, tokens, jnp.asarray([40, 31]), 64
    )
    active = np.stack([np.asarray(depth) > r for r in range(lm.program.recursions)])
    real = np.arange(40)[None] < np.array([40, 31])[:, None]
    np.testing.assert_array_equal(cache.entries_RxB(), (kept_entries(lm, active) & real).sum(-1))
    if kind in ROUTED and lm.depth.kv_name == "recursion_wise":
        assert (np.asarray(cache.entries_RxB())[-1] < [40, 31]).all()
    else:
        assert (np.asarray(cache.entries_RxB()) == [40, 31]).all()
    assert len(cache.core) == (1 if lm.depth.kv_name == "shared" else lm.program.recursions)


def test_decoding_with_the_rematerialisation_of_training():
    """A checkpoint's configuration is the training one."""
    lm = small_lm("mor_hybrid", remat="block")
    tokens = jnp.ones((2, 8), jnp.int32)
    _, cache, _ = jax.eval_shape(
        lambda p: prefill(lm, p, tokens, jnp.asarray([8, 5]), 16), random_params(lm)
    )
    jax.eval_shape(functools.partial(decode_step, lm), random_params(lm), cache, tokens[:, 0])
