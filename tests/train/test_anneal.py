"""A branch off a plateau is the run that had been planned to end there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from train.tiny_run import write_corpus

from mor_jax.config import from_dict
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.train.branch import anneal
from mor_jax.train.load import load_model
from mor_jax.train.loop import train


def records(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["loss"], r["lr"]) for r in lines if r["kind"] == "train"}


def test_it_is_the_run_that_was_planned_that_way(tmp_path):
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
            "optim": {"schedule": "constant", "warmup": 0.25, "ema": 0.9},
            "train": {
                "steps": 4,
                "batch_size": 4,
                "log_every": 1,
                "eval_every": 0,
                "eval_rows": 4,
                "checkpoint_every": 2,
            },
        }
    )
    train(cfg, tmp_path / "parent", progress=False)
    branch = anneal(cfg, tmp_path / "parent", tmp_path / "branch", 2, step=2, progress=False)
    assert branch == anneal(cfg, tmp_path / "parent", tmp_path / "branch", 2, progress=False), (
        "it has begun"
    )
    summary = train(branch, tmp_path / "branch", progress=False)
    # One step of warm-up of four, two of fall.
    planned = dataclasses.replace(branch.optim, warmup=0.25, decay=0.5)
    assert branch.optim == planned and summary["steps"] == 4 and summary["lineage"]["annealed"] == 2
    train(dataclasses.replace(branch, model=cfg.model), tmp_path / "planned", progress=False)
    whole, part = records(tmp_path / "planned"), records(tmp_path / "branch")
    assert sorted(part) == [3, 4] and all(part[s] == whole[s] for s in part)
    one, other = (load_model(tmp_path / run, average=True).params for run in ("planned", "branch"))
    jax.tree.map(np.testing.assert_array_equal, one, other)

    with pytest.raises(ConfigError, match=r"constant from step 1 to 2.*--anneal_at"):
        anneal(branch, tmp_path / "branch", tmp_path / "never", 2, step=4, progress=False)
    wrong = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=8))
    with pytest.raises(ConfigError, match="batch_size: 4 there, 8 here"):
        anneal(wrong, tmp_path / "parent", tmp_path / "never", 2, step=2, progress=False)
    with pytest.raises(CheckpointError, match="no branch of"):
        anneal(cfg, tmp_path / "parent", tmp_path / "planned", 2, progress=False)
