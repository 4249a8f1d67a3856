"""Low-rank adapters: they alone are trained and saved, and every command reads the merged model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import random_params, small_lm
from train.tiny_run import write_corpus

from mor_jax.config import AdapterConfig, from_dict
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.model.adapter import DOWN, INPUTS, UP, Adapters
from mor_jax.train.checkpoint import load_meta
from mor_jax.train.convert import merge_checkpoint
from mor_jax.train.load import load_model
from mor_jax.train.loop import train
from mor_jax.train.state import TrainState
from mor_jax.train.step import loss_fn, loss_scales, make_train_step

TINY = {
    "width": 16,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 24,
    "context": 12,
    "norms": "own",
    "lora_rank": 2,
}
LORA = AdapterConfig(rank=3, alpha=6.0, targets=("qkv", "out", "down"))


def spread(adapters):
    """Adapters of random numbers, both halves."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape).astype(np.float32)), adapters
    )


def test_merged_is_the_low_rank_sum_and_fresh_adapters_change_nothing():
    """Beside what recursions have of their own, which is called lora too, and stays."""
    lm = small_lm("recursive", **TINY, layers=4, recursions=2)
    params, made = random_params(lm), Adapters(lm, LORA)
    fresh = made.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, made.merged(params, fresh), params)
    axes = made.logical_axes()
    jax.tree.map(lambda x, a: np.testing.assert_equal(x.ndim, len(a)), fresh, axes)
    some = spread(fresh)
    merged = made.merged(params, some)
    for part, block, group, name in (
        ("core", "0", "attention", "qkv"),
        ("coda", "0", "mlp", "down"),
    ):
        old, new = (np.asarray(p[part][block][group][name]) for p in (params, merged))
        halves, rows = (
            some[part][block][group][name],
            int(np.prod(old.shape[: old.ndim - INPUTS[name]])),
        )
        product = np.asarray(halves[UP]).reshape(rows, 3) @ np.asarray(halves[DOWN]).reshape(3, -1)
        np.testing.assert_allclose((new - old).reshape(rows, -1), 2.0 * product, atol=1e-6)
    same = ("embed", "norm", "router")
    assert all(merged[name] is params[name] for name in same)

    def own(p):
        return (p["core"]["0"]["own"], p["core"]["0"]["mlp"]["gate_up"])

    jax.tree.map(np.testing.assert_array_equal, own(merged), own(params))


def test_a_step_moves_adapters_by_their_own_gradient():
    lm = small_lm(
        "vanilla", **{k: v for k, v in TINY.items() if k not in ("norms", "lora_rank")}, layers=1
    )
    params, made = random_params(lm), Adapters(lm, LORA)
    some = spread(made.init(jax.random.key(0)))
    seg = jnp.asarray([[1] * 7 + [2] * 5, [1] * 12], jnp.int32)
    batch = {"tokens": jnp.arange(24, dtype=jnp.int32).reshape(2, 12), "segment_ids": seg}

    def loss(a):
        return loss_fn(lm, made.merged(params, a), batch, loss_scales(lm, batch))[0]

    wanted = jax.jit(jax.grad(loss))(some)
    # Plain gradient descent's update is the gradient.
    tx = optax.sgd(1.0)
    step = jax.jit(make_train_step(lm, tx, accum=2, adapters=made))
    state = TrainState(jnp.zeros((), jnp.int32), some, tx.init(some))
    new, _ = step(state, batch, None, {"base": params})
    for now, before, grad in zip(*map(jax.tree.leaves, (new.params, some, wanted)), strict=True):
        np.testing.assert_allclose(before - now, grad, atol=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapters")
    corpus = write_corpus(directory / "corpus")
    cfg = from_dict(
        {
            "model": {
                "layers": 2,
                "recursions": 2,
                "sharing": "cycle",
                "width": 16,
                "heads": 2,
                "kv_heads": 1,
                "mlp_width": 32,
                "context": 32,
                "loss_chunk": 0,
            },
            "data": {
                "source": "files",
                "paths": (str(corpus),),
                "cache_dir": str(directory / "cache"),
            },
            "train": {
                "steps": 2,
                "batch_size": 4,
                "log_every": 1,
                "eval_every": 0,
                "eval_rows": 4,
                "checkpoint_every": 0,
            },
        }
    )
    train(cfg, directory / "base", progress=False)
    lora = dataclasses.replace(
        cfg, adapter=AdapterConfig(rank=2), optim=dataclasses.replace(cfg.optim, ema=0.5)
    )
    summary = train(lora, directory / "lora", progress=False, init_from=directory / "base")
    return directory, lora, summary


def test_a_run_saves_adapters_alone_and_is_read_merged(runs):
    directory, _, summary = runs
    base, found = load_model(directory / "base"), load_model(directory / "lora")
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), found.params, base.params)
    assert changed["core"]["0"]["attention"]["qkv"] and changed["core"]["0"]["mlp"]["down"]
    assert not any(jax.tree.leaves([changed[name] for name in ("embed", "norm")]))

    def size(run):
        return sum(
            p.stat().st_size for p in (directory / run / "checkpoints").rglob("*") if p.is_file()
        )

    assert size("lora") < size("base") and summary["lineage"]["parent"] == str(directory / "base")
    merge_checkpoint(directory / "lora", directory / "merged", average=True)
    merged, mean = load_model(directory / "merged"), load_model(directory / "lora", average=True)
    jax.tree.map(np.testing.assert_array_equal, merged.params, mean.params)
    assert (
        load_meta(directory / "merged" / "checkpoints")[1]["lineage"]["before"]
        == summary["lineage"]
    )


def test_it_goes_on_with_the_weights_it_began_with(runs):
    directory, lora, _ = runs
    more = dataclasses.replace(lora, train=dataclasses.replace(lora.train, steps=3))
    assert train(more, directory / "lora", progress=False, allow=["train.steps"])["steps"] == 3
    with pytest.raises(ConfigError, match="--init_from"):
        train(lora, directory / "fresh", progress=False)
    (directory / "base").rename(directory / "gone")
    try:
        with pytest.raises(CheckpointError, match=r"adapters of the weights in .*base.*--merge"):
            load_model(directory / "lora")
    finally:
        (directory / "gone").rename(directory / "base")
