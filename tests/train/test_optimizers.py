"""Muon and the scale of the shared core, the running mean of the weights, the best weights and the
early end of a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm
from train.tiny_run import write_corpus

from mor_jax.config import Config, MeshConfig, OptimConfig, from_dict
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.checkpoint import Checkpointer
from mor_jax.train.load import load_model
from mor_jax.train.loop import train
from mor_jax.train.schedule import MUON_RMS, core_factor, optimizer_of
from mor_jax.train.state import abstract_state, create_state
from mor_jax.train.step import averaged

TINY = {"width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24, "context": 16}
FLAT = {
    "schedule": "constant",
    "peak_lr": 0.1,
    "warmup": 0.0,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
}


def config(kind, **optim):
    lm = small_lm(kind, **TINY)
    return Config(model=lm.model, depth=lm.depth, optim=OptimConfig(**FLAT | optim)), lm


def first_update(cfg, lm):
    tx, params = optimizer_of(cfg, 10), random_params(lm)
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(random_params(lm, 1), params)


def test_muon_makes_each_matrix_of_a_block_orthogonal_and_leaves_the_rest_to_adamw():
    """Each head's queries, keys and values apart; of the size of AdamW's updates."""
    cfg, lm = config("mor", algorithm="muon", core_lr=1.0)
    update, adamw = first_update(cfg, lm), first_update(config("mor")[0], lm)
    for part in ("prelude", "core"):
        block = update[part]["0"]
        heads = np.asarray(block["attention"]["qkv"]).reshape(-1, 4, 16)
        mlp = block["mlp"]
        for one in [
            *heads,
            np.reshape(block["attention"]["out"], (16, -1)),
            *mlp["gate_up"],
            mlp["down"],
        ]:
            size = np.linalg.svd(one, compute_uv=False) / (0.1 * MUON_RMS * np.sqrt(max(one.shape)))
            assert size.min() > 0.5 and size.max() < 1.3, (
                "five steps of Newton-Schulz come as near to 1"
            )
    for name in ("embed", "norm", "router"):
        for mine, theirs in zip(
            jax.tree.leaves(update[name]), jax.tree.leaves(adamw[name]), strict=True
        ):
            assert mine.shape == theirs.shape
            # The first step of Adam with Nesterov's momentum is longer; its direction is the same.
            assert np.all(np.sign(mine) == np.sign(theirs))


@pytest.mark.parametrize(
    ("kind", "times"),
    [("vanilla", 1), ("recursive", 3), ("sequence", 3), ("mor", (16 + 10 + 5) / 16)],
)
def test_the_core_learns_more_slowly_the_more_often_a_token_runs_it(kind, times):
    cfg, lm = config(kind, algorithm="muon")
    assert core_factor(cfg) == pytest.approx(1 / times)
    assert core_factor(config(kind)[0]) == 1 and core_factor(config(kind, core_lr=0.25)[0]) == 0.25
    own, even = (
        first_update(cfg, lm),
        first_update(config(kind, algorithm="muon", core_lr=1.0)[0], lm),
    )
    for part in ("prelude", "core"):
        for mine, theirs in zip(
            jax.tree.leaves(own[part]), jax.tree.leaves(even[part]), strict=True
        ):
            np.testing.assert_allclose(
                mine, theirs / (times if part == "core" else 1), rtol=2e-5, atol=1e-8
            )


def test_a_state_with_muon_and_a_mean_is_saved_and_restored(tmp_path):
    cfg, lm = config("mor", algorithm="muon")
    tx, mesh = optimizer_of(cfg, 10), make_mesh(MeshConfig(data=-1))
    state = create_state(lm, tx, mesh, 0, average=True)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        found = checkpoints.restore_latest(abstract_state(lm, tx, mesh, average=True)).state
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_the_mean_forgets_at_its_rate_and_faster_at_first():
    params = [{"w": jnp.full(2, x), "router": {"survey": jnp.full(2, x)}} for x in (0.0, 1.0, 3.0)]
    mean = params[0]
    for step, (new, keep) in enumerate(zip(params[1:], (0.1, 2 / 11), strict=True)):
        want = keep * mean["w"] + (1 - keep) * new["w"]
        mean = averaged(mean, new, 0.9, jnp.asarray(step))
        np.testing.assert_allclose(mean["w"], want, rtol=1e-6)
        # counts, no weight
        np.testing.assert_array_equal(mean["router"]["survey"], new["router"]["survey"])
    late = averaged(mean, params[0], 0.9, jnp.asarray(1000))
    np.testing.assert_allclose(late["w"], 0.9 * mean["w"], rtol=1e-6)


def test_a_run_keeps_its_best_weights_and_ends_when_nothing_improves(tmp_path):
    """A rate that changes nothing: the first evaluation stays the best."""
    corpus = write_corpus(tmp_path / "corpus")
    cfg = from_dict(
        {
            "model": {
                "layers": 1,
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
                "cache_dir": str(tmp_path / "cache"),
            },
            "optim": {"peak_lr": 1e-30, "weight_decay": 0.0, "ema": 0.5},
            "train": {
                "steps": 9,
                "batch_size": 4,
                "eval_every": 1,
                "eval_rows": 4,
                "checkpoint_every": 2,
                "keep_best": True,
                "patience": 2,
            },
        }
    )
    summary = train(cfg, tmp_path / "run", progress=False)
    assert summary["finished"] and summary["ended_early"] == 3 and summary["best"]["step"] == 1
    assert [p.name for p in (tmp_path / "run" / "best").iterdir()] == ["1"]
    best, last = load_model(tmp_path / "run" / "best"), load_model(tmp_path / "run")
    mean = load_model(tmp_path / "run", average=True)
    assert (best.step, last.step) == (1, 3)
    for one in (best, mean):
        jax.tree.map(np.testing.assert_array_equal, one.params, last.params)
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(r["kind"] == "eval_average" for r in records) == 3
    assert train(cfg, tmp_path / "run", progress=False) == summary, "it is finished"
