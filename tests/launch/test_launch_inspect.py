"""`launch.inspect` on configurations and on checkpoints."""

import json

import pytest
from train.tiny_run import records, run

from mor_jax.analysis.accounting import kv_bytes_per_token
from mor_jax.train.load import describe


def test_a_configuration_in_tables_and_as_json():
    done = run("inspect", "--config", "configs/mor.py:360m,nr=3")
    assert done.returncode == 0, done.stderr
    for word in (
        "embed → [0] → (1 2 … 10) × 3 → [11] → norm → head",
        "118M",
        "555.7",
        "14,160",
        "recursion 3",
        "H100",
    ):
        assert word in done.stdout
    args = (
        "--config",
        "configs/mor.py:1.7b,nr=3",
        "--config.mesh.fsdp=8",
        "--config.train.steps=7",
    )
    done = run("inspect", *args, "--devices", 8, "--json", "--context", 100)
    report = json.loads(done.stdout)
    assert report["run"]["steps"] == 7 and report["memory"]["mesh"] == [1, 8, 1, 1]
    assert report["kv"]["traffic"]["context"] == 100


def test_a_checkpoint_is_counted_at_its_measured_depths(trained):
    done = run("inspect", "--checkpoint", trained.mor, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    config, shares = describe(trained.mor)
    assert list(shares) == records(trained.mor, "eval")[-1]["causal/active_share"]
    measured = kv_bytes_per_token(config.model, config.depth, mean_active=shares)
    assert report["kv"]["measured"] and report["kv"]["bytes_per_token"] == pytest.approx(measured)
    assert report["run"]["steps"] == 120
    plain = run("inspect", "--checkpoint", trained.vanilla / "checkpoints", "--step", 80)
    assert plain.returncode == 0 and "[0]" in plain.stdout, plain.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["--config", "--checkpoint"]),
        (("--config", "configs/mor.py", "--checkpoint", "x"), ["either"]),
        (("--checkpoint", "/nowhere"), ["/nowhere"]),
        (("--config", "configs/mor.py", "--mfu", "40"), ["MFU", "40"]),
        (
            ("--config", "configs/mor.py", "--devices", "3", "--config.mesh.fsdp=2"),
            ["config.mesh", "3 devices"],
        ),
    ],
)
def test_mistakes_are_one_line(args, words):
    done = run("inspect", *args)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words)
