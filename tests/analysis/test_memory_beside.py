"""Teacher, reference, adapters and running mean in the memory of a step: what is planned are the
bytes of the arrays that a step is given."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from mor_jax.analysis.accounting import parameters
from mor_jax.analysis.inspection import inspect_config, inspection_tables
from mor_jax.analysis.memory import training_memory
from mor_jax.analysis.plan import plan
from mor_jax.analysis.topologies import topology
from mor_jax.config import Config, ModelConfig, TrainConfig, from_dict
from mor_jax.errors import ConfigError
from mor_jax.model.program import build_program
from mor_jax.train.aot import lower_step

MODEL = {
    "layers": 5,
    "recursions": 3,
    "sharing": "middle_cycle",
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 48,
    "vocab_size": 320,
    "context": 64,
    "loss_chunk": 16,
}
CASES = {
    "plain": {},
    "mean": {"optim": {"ema": 0.9}},
    "muon": {"optim": {"algorithm": "muon"}},
    "adapters": {"adapter": {"rank": 4}, "optim": {"ema": 0.9}},
    "teacher": {"distill": {"weight": 0.5}, "depth": {"policy": "expert_choice"}},
    "reference": {"data": {"format": "preference", "source": "files", "paths": ("x",)}},
    "adapters of a reference": {
        "adapter": {"rank": 2, "targets": ("qkv", "down")},
        "data": {"format": "preference", "source": "files", "paths": ("x",)},
    },
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run directory of a wider model; nothing but its configuration is read."""
    run = tmp_path_factory.mktemp("teacher")
    model = MODEL | {"layers": 2, "recursions": 1, "sharing": "none", "width": 64}
    (run / "config.json").write_text(json.dumps(from_dict({"model": model}).to_dict()))
    return run


def config(case, teacher) -> Config:
    raw = {"model": MODEL, "train": {"steps": 10, "batch_size": 4, "accum": 2}, **CASES[case]}
    if "distill" in raw:
        raw["distill"] = raw["distill"] | {"teacher": str(teacher)}
    return from_dict(raw)


@pytest.mark.parametrize("case", CASES)
def test_what_is_planned_are_the_bytes_a_step_is_given(case, teacher):
    cfg = config(case, teacher)
    lowered, _ = lower_step(cfg, jax.devices()[:1])
    (state, _, _, beside), _ = lowered.args_info

    def size(tree):
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    found = training_memory(cfg)
    assert found.weights == size(state.params)
    counters = 64  # steps that the optimiser counts, and constants of Muon's iteration
    assert found.optimizer == pytest.approx(size(state.opt_state), abs=counters)
    assert found.average == size(state.average)
    # the base of adapters and the reference are the same arrays
    given = size(beside) / (2 if case == "adapters of a reference" else 1)
    assert found.frozen == given
    assert (found.frozen > 0) == (case not in ("plain", "mean", "muon"))
    held = found.weights + found.optimizer + found.average + found.frozen
    assert found.total == held + max(found.moments.values())
    planned = plan(cfg, topology("h100x1")).bytes_by_kind()
    assert sum(planned.values()) == pytest.approx(found.total)
    assert planned.get("frozen weights", 0) == found.frozen


def test_adapters_are_cut_and_shown(teacher):
    cfg = config("adapters", teacher)
    cut = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=1, fsdp=4))
    one, four = training_memory(cfg), training_memory(cut, devices=4)
    assert one.frozen / 4 < four.frozen < one.frozen / 3  # norms are whole everywhere
    assert four.weights < one.weights
    full = training_memory(dataclasses.replace(cfg, adapter=Config().adapter))
    assert one.weights + one.optimizer < full.weights / 2  # why one trains adapters
    report = inspect_config(cfg)
    assert report["memory"]["frozen"] == one.frozen
    rows = [list(t.columns[0].cells) for t in inspection_tables(report) if hasattr(t, "columns")]
    assert any({"frozen", "average"} <= set(names) for names in rows)


def test_a_teacher_that_cannot_be_read_is_named(tmp_path, teacher):
    cfg = config("teacher", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        training_memory(cfg)
    off = dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, weight=0.0))
    assert training_memory(off).frozen == 0.0


def test_a_loop_of_blocks_costs_its_stack_and_the_gradients_of_two_recursions():
    """On TPUs, where "auto" makes loops; of a model whose blocks are unrolled nothing changes."""
    shape = dict(width=64, heads=4, kv_heads=4, mlp_width=96, vocab_size=128, context=16)

    def added(layers, **model):
        m = ModelConfig(layers=layers, remat="block", dtype="bfloat16", **shape, **model)
        cfg = Config("x", m, train=TrainConfig(steps=1, batch_size=8))
        on_tpu, unrolled = (training_memory(cfg, backend=b) for b in ("tpu", "cpu"))
        block = 2 * parameters(m, cfg.depth).blocks / build_program(m).unique_layers
        return (
            (on_tpu.gathered - unrolled.gathered) / block,
            on_tpu.core_gradient / block,
            unrolled.core_gradient / block,
        )

    assert added(3) == (0, 0, 0)
    # one device: the copies that products read, and their gradients
    assert added(6) == (2 * 6, 0, 0)
    # float32 on one device, two values of bfloat16: all blocks of two recursions, or of one and a
    # block of the other
    assert added(15, recursions=3, sharing="cycle") == (0, 2 * (5 + 5), 2 * (5 + 1))
