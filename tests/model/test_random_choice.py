"""Random routing: as many tokens a step as its capacities say, drawn from nothing but seed, token,
place and salt."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.config import OptimConfig
from mor_jax.errors import UserError
from mor_jax.inference.dial import calibrate, depth_control
from mor_jax.model.depth.random_choice import uniforms
from mor_jax.model.lm import positions_in_document
from mor_jax.train.schedule import optimizer
from mor_jax.train.state import TrainState
from mor_jax.train.step import loss_fn, loss_scales, make_train_step

T = 32
SHAPE = {"layers": 3, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": T}


@functools.cache
def model():
    lm = small_lm("random_shared", **SHAPE)
    return lm, random_params(lm)


def rows(seed=0, batch=4):
    tokens = jax.random.randint(jax.random.key(seed), (batch, T), 0, 64)
    seg = jnp.broadcast_to(1 + (jnp.arange(T) >= 20), (batch, T)) * (jnp.arange(T) < 29)
    return {
        "tokens": tokens,
        "segment_ids": seg.astype(jnp.int32),
        "salt": jnp.arange(batch, dtype=jnp.uint32),
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(lm, params, batch, executor):
    return lm.forward(
        params, batch["tokens"], batch["segment_ids"], executor=executor, salt_B=batch["salt"]
    )


def test_both_executors_run_the_same_tokens_to_the_same_end():
    lm, params = model()
    out_m, out_g = (run(lm, params, rows(), executor) for executor in ("masked", "gathered"))
    np.testing.assert_array_equal(out_m.depth_BxT, out_g.depth_BxT)
    np.testing.assert_allclose(out_m.h_BxTxD, out_g.h_BxTxD, atol=1e-5)
    counts = lm.policy.profiles(T)[0]
    np.testing.assert_array_equal(
        out_g.active_RxBxT.sum(-1), np.minimum(np.array(counts)[:, None], [[29] * 4])
    )
    assert len({row.tobytes() for row in np.asarray(out_g.depth_BxT)}) == 4  # each row its own draw
    assert params["router"] == {}


def test_a_draw_is_of_its_seed_token_place_and_salt_alone():
    tokens, seg = rows()["tokens"], rows()["segment_ids"]
    pos = positions_in_document(seg)
    plain = uniforms(0, 3, tokens, pos)
    assert float(plain.min()) >= 0 and float(plain.max()) < 1
    # One token of a decoder's batch, whatever lane it is in.
    np.testing.assert_array_equal(
        uniforms(0, 3, tokens[2:3, 7:8], pos[2:3, 7:8])[0, 0], plain[2, 7]
    )
    # A document draws behind another one what it draws alone.
    np.testing.assert_array_equal(uniforms(0, 3, tokens[:, 20:29], pos[:, :9]), plain[:, 20:29])
    salted = uniforms(0, 3, tokens, pos, jnp.full((4,), 5, jnp.uint32))
    for other in (salted, uniforms(1, 3, tokens, pos), uniforms(0, 3, (tokens + 1) % 64, pos)):
        assert float(jnp.mean(other == plain)) < 0.01
    assert (
        abs(np.corrcoef(np.asarray(plain[..., 0]).ravel(), np.asarray(plain[..., 1]).ravel())[0, 1])
        < 0.3
    )


def test_inference_keeps_the_shares_of_training_and_the_dial_moves_them():
    lm, params = model()
    tokens = jax.random.randint(jax.random.key(3), (64, T), 0, 64)
    causal = jax.jit(lambda c: lm.forward(params, tokens, mode="causal", control=c).depth_BxT)
    depth = np.asarray(causal(depth_control(lm, params, 64)))
    for r, share in enumerate((1, 2 / 3, 1 / 3)):
        # 2,048 tokens: three standard errors
        assert (depth > r).mean() == pytest.approx(share, abs=0.04)
    for mean in (0.5, 1.5, 2.6, 3.0):
        assert causal(depth_control(lm, params, 64, mean_depth=mean)).mean() == pytest.approx(
            mean, abs=0.06
        )
    with pytest.raises(UserError, match="'random' has no router"):
        calibrate(lm, params, [])


def test_each_training_step_draws_anew_and_accumulation_does_not():
    lm, params = model()
    batch = {name: leaf for name, leaf in rows().items() if name != "salt"}
    tx = optimizer(OptimConfig(peak_lr=1e-9, weight_decay=0.0), 10)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    step = jax.jit(make_train_step(lm, tx))
    after, first = step(state, batch)
    _, second = step(after, batch)
    _, again = step(state, batch)
    assert float(first["loss"]) == float(again["loss"])
    # the weights are the same to the last digits
    assert float(first["loss"]) != float(second["loss"])
    # Rows keep their draws when they are split up: the two halves are the whole.
    whole = batch | {"salt": jnp.arange(1, 5, dtype=jnp.uint32)}
    sums = jax.jit(
        lambda b: loss_fn(lm, params, b, loss_scales(lm, whole), executor="masked")[1]["lm_loss"]
    )
    halves = [{name: leaf[i::2] for name, leaf in whole.items()} for i in range(2)]
    np.testing.assert_allclose(sum(map(sums, halves)), first["loss"], rtol=1e-5)
