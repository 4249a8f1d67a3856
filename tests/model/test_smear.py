"""`model.smear`: embeddings of the tokens before, of the same document and never of the future.
(Decoding, the engine with speculation, and cut rows: `ALL_FEATURES` has it.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.config import Config, ModelConfig, check
from mor_jax.errors import ConfigError
from mor_jax.inference.engine.device import Device, EngineConfig, Lengths
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import host_row
from mor_jax.model import block as network

SMEAR, T = 3, 24


def test_it_is_a_causal_depthwise_convolution_of_a_document():
    m = ModelConfig(vocab_size=16, width=8, smear=SMEAR)
    rng = np.random.default_rng(0)
    table, mix = (
        rng.normal(size=(16, 8)).astype(np.float32),
        rng.normal(size=(SMEAR, 8)).astype(np.float32),
    )
    tokens, pos = rng.integers(0, 16, 9), [0, 1, 2, 3, 4, 0, 1, 0, 1]  # three documents
    got = network.embed(
        m,
        {"embed": {"table": table, "smear": mix}},
        tokens,
        np.zeros(SMEAR, np.int32),
        np.asarray(pos),
    )
    for t, p in enumerate(pos):
        want = table[tokens[t]] + sum(
            mix[i - 1] * table[tokens[t - i]] for i in range(1, min(p, SMEAR) + 1)
        )
        np.testing.assert_allclose(got[t], want, atol=1e-6)


def test_packed_documents_do_not_see_each_other():
    lm = small_lm("vanilla", layers=1, smear=SMEAR)
    params = random_params(lm)
    run = jax.jit(lambda tokens, seg: lm.apply(params, tokens, seg, mode="causal"))
    tokens = jax.random.randint(jax.random.key(0), (1, T), 0, 64)
    seg = jnp.asarray([[1] * 10 + [2] * 12 + [0] * 2])
    packed = run(tokens, seg)
    alone = run(jnp.roll(tokens, -10, axis=1), (jnp.arange(T) < 12).astype(jnp.int32)[None])
    # another place in the row: order of sums
    np.testing.assert_allclose(packed[0, 10:22], alone[0, :12], atol=1e-4)
    other = run(tokens.at[0, 12].set((tokens[0, 12] + 1) % 64), seg)
    changed = np.flatnonzero(np.abs(np.asarray(other - packed)).max(axis=(0, 2)) > 0)
    assert changed[0] == 12 and changed[-1] < 22


@pytest.mark.parametrize("speculate", [0, 2])
def test_a_lane_with_a_saved_prefix_draws_what_it_would_have_drawn(speculate):
    lm = small_lm("mor", layers=3, context=32, smear=SMEAR)
    device = Device(
        lm,
        random_params(lm),
        EngineConfig(lanes=2, chunks=(8,), boundary_every=3, speculate=speculate, full_lanes=2),
    )
    device.warm_up()
    prompt = np.random.default_rng(1).integers(0, 64, 12).tolist()

    def drawn(lane, from_saved=None):
        device.open(lane)
        if from_saved is not None:
            device.load(lane, from_saved)
        for start in range(0 if from_saved is None else 8, 11, 8):
            device.prefill(lane, prompt[start : min(start + 8, 11)]).fetch()
        device.start(
            lane,
            prompt[-1],
            host_row(Drawing(temperature=0.0), device.draw_config, prompt=prompt),
            9,
        )
        told = []
        while len(told) < 9:
            told += [int(t.token_N[lane]) for t in device.tick().fetch() if t.token_N[lane] >= 0]
        device.stop(lane)
        return told

    want = drawn(0)
    device.open(0)
    at = device.prefill(0, prompt[:8]).fetch().lengths
    saved = device.save(0, Lengths(0, 0), at)
    device.open(1)
    device.prefill(1, [7] * 8).fetch()  # other tokens in the lane that loads
    assert drawn(1, saved) == want


def test_off_by_default_and_refused_where_it_cannot_be():
    assert "smear" not in jax.eval_shape(small_lm("mor").init, jax.random.key(0))["embed"]
    with pytest.raises(ConfigError, match=r"model\.smear counts previous tokens"):
        check(Config(model=ModelConfig(smear=-1)))
