"""Every preset of configs/family/: it passes the door, trains, and decodes as it trains."""

import dataclasses
import functools
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params

import configs.family
from mor_jax.analysis import accounting
from mor_jax.config import from_config_dict
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.model.depth.survey import SURVEY
from mor_jax.model.lm import LM
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import TrainState
from mor_jax.train.step import make_train_step

PRESETS = sorted(m.name for m in pkgutil.iter_modules(configs.family.__path__) if m.name != "base")
# small programs
ARGUMENTS = {
    "huginn": "r=2,k=1",
    "parcae": "r=2,k=1",
    "etd": "k=2",
    "rins:stochastic": "stochastic",
    "trm": "n=1,t=1,m=1",
    "hrm": "n=1,t=1,m=1",
    "cgar": "n=1,t=1,m=2",
    "urm": "r=1,k=1,m=2",
    "deq": "r=3",
    "mod": "pairs=2",
}
T = 12


@pytest.mark.parametrize("name", [*PRESETS, "rins:stochastic"])
def test_a_preset_trains_and_decodes(name):
    preset = importlib.import_module(f"configs.family.{name.split(':')[0]}")
    from_config_dict(preset.get_config())  # as it comes
    cfg = from_config_dict(preset.get_config(ARGUMENTS.get(name, "r=2")))
    small = {
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "mlp_width": 24,
        "vocab_size": 64,
        "context": T,
        "init_std": 0.2,
    }
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **small))
    lm, tx = LM.from_config(cfg), optimizer_of(cfg, 20)
    params = random_params(lm)
    count = accounting.parameters(cfg.model, cfg.depth, cfg.recursion)
    router = {name: leaf for name, leaf in params["router"].items() if name != SURVEY}
    weights = params | {"router": router}  # the survey of a router's scores is no weight
    assert count.total == sum(leaf.size for leaf in jax.tree.leaves(weights))

    tokens = jax.random.randint(jax.random.key(0), (4, T), 0, 64)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens)}
    step = jax.jit(make_train_step(lm, tx))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    for _ in range(2):
        state, metrics = step(state, batch)
        assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
    assert all(
        float(jnp.abs(a - b).max()) > 0
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True)
    )

    params = state.params
    lengths = jnp.asarray([4, 4])

    @jax.jit  # one program for both: compiling is what a test of this size costs
    def start(p):
        return lm.apply(p, tokens[:2], mode="causal"), prefill(lm, p, tokens[:2, :4], lengths, T)

    full, (logits, cache, _) = start(params)
    np.testing.assert_allclose(logits, full[:, 3], atol=1e-4)
    decode = jax.jit(functools.partial(decode_step, lm))
    for at in range(4, 7):
        logits, cache, _ = decode(params, cache, tokens[:2, at])
        np.testing.assert_allclose(logits, full[:, at], atol=1e-4)
