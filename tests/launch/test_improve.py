"""`launch.improve`: rounds of measuring, leading and training that go on where they stopped."""

import json
import os
import re
import subprocess
import sys

import pytest

from rlm_runtime import training
from rlm_runtime.training.phrases import learn

SMALL = (
    "--config=configs/native_rlm.py:stage=improve,vanilla=1",
    "--config.model.layers=1",
    "--config.model.smear=0",
    "--config.model.width=16",
    "--config.model.heads=2",
    "--config.model.kv_heads=1",
    "--config.model.mlp_width=32",
    "--config.train.steps=2",
    "--config.train.checkpoint_every=0",
    "--config.data.holdout=0.3",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with samples, their tokenizer, and a model of two steps."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("improve")
    training.make(
        ["outside", "absent"], 10, out=folder / "train.jsonl", lengths=[1000], readings_share=0
    )
    learn(folder / "train.jsonl", folder / "tokenizer.json")
    done = command(folder, "train", "--workdir=start")
    assert done.returncode == 0, done.stderr
    return folder


def command(folder, name, *flags):
    data = (
        f"--config.data.tokenizer={folder}/tokenizer.json",
        f"--config.data.paths=('{folder}/train.jsonl',)",
        f"--config.data.cache_dir={folder}/cache",
    )
    return subprocess.run(
        [sys.executable, "-m", "launch", name, *SMALL, *data, *flags],
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def improve(folder, *flags):
    common = (
        "--workdir=better",
        "--init_from=start",
        "--tasks=outside,absent",
        "--eval_runs=2",
        "--length=1000",
    )
    return command(folder, "improve", *common, *flags)


def test_rounds_go_on_where_they_were_stopped(place):
    first = improve(place, "--samples=train.jsonl", "--rounds=1")
    assert first.returncode == 0, first.stderr
    heldout = place / "better" / "round-0" / "heldout.jsonl"
    before = heldout.read_text(), json.loads((place / "better" / "improve.json").read_text())
    assert [p["round"] for p in before[1]] == [0, 1]
    assert set(before[1][1]["tasks"]) == {"outside", "absent"}
    assert (place / "better" / "improve.png").exists()
    (place / "better" / "improve.json").unlink()  # as if it had been stopped before the end
    again = improve(place, "--samples=train.jsonl", "--rounds=1")
    assert re.search(r"best: round \d of 1", again.stdout), again.stderr
    curve = json.loads((place / "better" / "improve.json").read_text())
    assert (heldout.read_text(), curve) == before


def test_a_model_that_is_never_right_has_nothing_to_learn_from(place):
    done = improve(place, "--workdir=never", "--runs=2", "--draws=1", "--temperature=0")
    assert done.returncode == 2 and "nothing to learn from" in done.stderr
    assert "Traceback" not in done.stderr
    assert len((place / "never" / "round-0" / "rollouts.jsonl").read_text().splitlines()) == 2
    done = improve(place, "--workdir=unknown", "--tasks=nope")
    assert done.returncode == 2 and "task 'nope' is unknown" in done.stderr
