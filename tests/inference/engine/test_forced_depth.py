"""The model of the decoding benchmark: the engine runs it, and its tokens have the depths that it
was told."""

import jax
import numpy as np
import pytest

from benchmarks.forced_depth import ForcedLM, with_shares
from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import host_row

LANES, TICKS = 8, 60


@pytest.mark.parametrize("shares", [(1.0, 0.5, 0.2), (1.0, 1.0, 1.0)])
def test_depths_are_as_told(shares, device):
    device, params = device
    device.set_params(with_shares(params, shares))
    row, rng = (
        host_row(Drawing(temperature=0.0), device.draw_config, prompt=()),
        np.random.default_rng(0),
    )
    depths = []
    for _ in range(2):
        for lane in range(LANES):
            device.open(lane)
            device.start(lane, int(rng.integers(64)), row, TICKS)
        for _ in range(TICKS):
            (done,) = device.tick().fetch()
            depths += done.depth_N[done.token_N >= 0].tolist()
    reached = [np.mean(np.array(depths) >= r) for r in (1, 2, 3)]
    # Greedy texts of a random model go round, so the depths of a lane are a few draws again and
    # again.
    np.testing.assert_allclose(reached, shares, atol=0.15)
    assert len(depths) > LANES * TICKS // 2


@pytest.fixture(scope="module")
def device():
    model = ModelConfig(
        layers=5,
        recursions=3,
        sharing="middle_cycle",
        width=32,
        heads=2,
        kv_heads=1,
        mlp_width=48,
        vocab_size=64,
        context=64,
        init_std=0.3,
    )
    lm = ForcedLM(model, DepthConfig("expert_choice"))
    params = jax.jit(lm.init)(jax.random.key(0))
    device = Device(
        lm, params, EngineConfig(lanes=LANES, chunks=(1,), boundary_every=3, full_lanes=LANES)
    )
    made = device.uncompiled()
    made.compile_tick(3, 1)
    made.compile_small()
    device.use(made)
    return device, params
