"""Switches for looking inside a run."""

import gzip
import json
import runpy

import jax
import jax.numpy as jnp
import pytest
from train.tiny_run import records, write_config, write_corpus

from mor_jax.config import from_config_dict
from mor_jax.errors import ConfigError
from mor_jax.train.debug import Debug
from mor_jax.train.loop import train


def test_steps_to_trace_are_read_and_refused():
    assert Debug.parse(["20", "22"], nans=True) == Debug((20, 22), nans=True)
    assert Debug.parse(None) == Debug()
    for bad in (["20"], ["a", "b"], ["3", "2"], ["0", "2"]):
        with pytest.raises(
            ConfigError, match=f"--profile_steps={','.join(bad)} must be two whole numbers"
        ):
            Debug.parse(bad)


def test_without_scan_there_is_no_loop_and_without_jit_no_program():
    def cumulated(x):
        return jax.lax.scan(lambda c, y: (c * 2 + y, c), jnp.zeros(()), x)

    x, plain = jnp.arange(3.0), jax.lax.scan
    whole = jax.jit(cumulated).lower(x).compile().as_text()
    with Debug(scan=False).applied():
        unrolled = jax.jit(lambda x: cumulated(x)).lower(x).compile()
        assert "while" in whole and "while" not in unrolled.as_text()
        assert jax.tree.all(jax.tree.map(jnp.array_equal, unrolled(x), jax.jit(cumulated)(x)))
    assert jax.lax.scan is plain
    seen = []
    with Debug(jit=False).applied():
        jax.jit(lambda x: seen.append(float(x)))(x[1])  # a tracer has no value
    assert seen == [1.0]
    with pytest.raises(FloatingPointError), Debug(nans=True).applied():
        jax.jit(jnp.log)(jnp.float32(-1.0)).block_until_ready()


def test_a_run_leaves_a_trace_its_program_and_its_memory(tmp_path):
    get_config = runpy.run_path(str(write_config(tmp_path, write_corpus(tmp_path))))["get_config"]
    raw = get_config("vanilla").to_dict()
    cfg = from_config_dict(
        raw | {"train": raw["train"] | dict(steps=4, eval_every=0, checkpoint_every=0)}
    )
    train(cfg, tmp_path / "run", progress=False, debug=Debug(profile_steps=(2, 3)))
    traces = [p.stat().st_size for p in (tmp_path / "run" / "profile").rglob("*.xplane.pb")]
    assert len(traces) == 1 and traces[0] > 1000
    with gzip.open(tmp_path / "run" / "program" / "train_step.hlo.txt.gz", "rt") as f:
        text = f.read()
    assert text.startswith("HloModule") and "ENTRY" in text
    memory = json.loads((tmp_path / "run" / "program" / "memory.json").read_text())
    assert memory["argument_bytes"] > 0 and memory["alias_bytes"] > 0  # the state is donated
    last = records(tmp_path / "run", "goodput")[-1]
    assert last["share/compile"] > 0 and last["share/start"] > 0 and last["starts"] == 1
