"""Length curriculum: rows cut into pieces are rows whose documents end there, and every step is
counted."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_params, small_lm
from train.tiny_run import write_corpus

from mor_jax.analysis import accounting
from mor_jax.config import Config, OptimConfig, TrainConfig, check, from_dict
from mor_jax.errors import ConfigError
from mor_jax.train import step as step_module
from mor_jax.train.loop import train
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import TrainState
from mor_jax.train.step import make_train_step

TINY = {"width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24, "context": 32}
LENGTHS = ((8, 0.25), (16, 0.25))


def test_a_step_on_pieces_is_one_on_rows_whose_documents_end_there():
    lm = small_lm("recursive", **TINY, layers=3, sharing="cycle")
    cfg = Config(model=lm.model, optim=OptimConfig(peak_lr=1e-2, schedule="constant"))
    tx, params = optimizer_of(cfg, 10), random_params(lm)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    tokens = jax.random.randint(jax.random.key(0), (4, 32), 0, 64)
    seg = jnp.broadcast_to(1 + (jnp.arange(32) >= 13), (4, 32)) * (jnp.arange(32) < 29)
    ends = seg + 2 * (jnp.arange(32) // 8) * (seg > 0)  # another document after each 8 tokens
    rows = {"tokens": tokens, "segment_ids": seg.astype(jnp.int32)}
    cut = jax.jit(make_train_step(lm, tx, accum=2, length=8))(state, rows)
    whole = jax.jit(make_train_step(lm, tx, accum=2))(
        state, rows | {"segment_ids": ends.astype(jnp.int32)}
    )
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(cut[1][name], whole[1][name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(cut[0].params), jax.tree.leaves(whole[0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # Adam's first step is the gradient's sign


def test_each_step_has_its_length_and_its_flops():
    t = TrainConfig(steps=10, batch_size=4, lengths=LENGTHS)
    assert [t.row_length(n, 10, 32) for n in range(1, 11)] == [8] * 2 + [16] * 3 + [32] * 5
    lm = small_lm("mor", **TINY)
    cfg = Config(model=lm.model, depth=lm.depth, train=t)
    steps = [accounting.true_step_flops(cfg, n) for n in range(1, 11)]
    assert steps[0] < steps[2] < steps[9]
    assert accounting.true_training_flops(cfg, 10) == pytest.approx(sum(steps))
    without = dataclasses.replace(cfg, train=dataclasses.replace(t, lengths=()))
    assert steps[9] == accounting.true_step_flops(without, 10)
    assert sum(steps) < accounting.true_training_flops(without, 10)


def test_a_run_grows_its_rows(tmp_path, monkeypatch):
    lengths, make = [], step_module.make_train_step

    def noted(*args):
        lengths.append(args[-1])
        return make(*args)

    monkeypatch.setattr(step_module, "make_train_step", noted)
    data = {"source": "files", "paths": (str(write_corpus(tmp_path / "corpus")),)}
    steps = {"steps": 4, "batch_size": 4, "log_every": 1, "eval_every": 0, "eval_rows": 4}
    raw = {
        "model": {**TINY, "layers": 1, "loss_chunk": 0},
        "data": {**data, "cache_dir": str(tmp_path / "cache")},
        "train": {**steps, "checkpoint_every": 0, "lengths": ((8, 0.25), (16, 0.5))},
    }
    train(from_dict(raw), tmp_path / "run", progress=False)
    assert lengths == [8, 16, 0]  # a program of each, and no other
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    tokens = [r["tokens"] for r in lines if r["kind"] == "train"]
    assert tokens == [128, 256, 384, 512]  # as many a step at every length


@pytest.mark.parametrize(
    "change, said",
    [
        ({"train": {"lengths": ((12, 0.5),)}}, "cannot be cut into pieces of 12"),
        ({"train": {"lengths": ((16, 0.2), (8, 0.2))}}, "must rise"),
        ({"train": {"lengths": ((8, 0.5), (16, 0.5))}}, "below 1 together"),
        ({"data": {"format": "chat", "source": "files", "paths": ("x",)}}, "keeps conversations"),
        ({"mesh": {"sequence": 2}}, "along time"),
    ],
)
def test_what_cannot_be_cut_is_named(change, said):
    base = {"model": TINY | {"vocab_size": 64}, "train": {"steps": 10, "lengths": LENGTHS}}
    raw = {name: base.get(name, {}) | change.get(name, {}) for name in {*base, *change}}
    with pytest.raises(ConfigError, match=said):
        check(from_dict(raw), devices=2)
