"""Run directories as they are found in life: whole, half-written, resumed, of another version, no
run at all."""

import json
import shutil

import pytest

from mor_jax.analysis.runs import RunRecord
from mor_jax.errors import UserError


@pytest.fixture
def copy(run_dirs, tmp_path):
    return shutil.copytree(run_dirs[1], tmp_path / "copy")


def test_a_whole_run(run_dirs):
    run = RunRecord.load(run_dirs[1])
    assert run.name == "mor3"
    assert run.finished and run.routed and run.recursions == 3
    assert run.steps == run.summary["steps"] == run.train[-1]["step"]
    assert run.notes == ()
    steps, values = run.series("lm_loss")
    assert len(steps) == len(values) == 60
    assert run.last_eval("causal/nll") == run.evals[-1]["causal/nll"]


def test_half_a_last_line_is_skipped(copy):
    with open(copy / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 999999, "lo')
    run = RunRecord.load(copy)
    assert len(run.train) == 60
    assert run.notes == ()


def test_a_broken_line_in_the_middle_is_said(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join([lines[0], "\x00\x00", *lines[1:]]))
    run = RunRecord.load(copy)
    assert len(run.train) == 60
    assert "1 unreadable line" in " ".join(run.notes)


def test_a_resumed_run_counts_a_step_once(copy):
    first = json.loads((copy / "metrics.jsonl").read_text().splitlines()[0])
    with open(copy / "metrics.jsonl", "a") as f:
        f.write(json.dumps(first | {"lm_loss": 42.0}) + "\n")
    run = RunRecord.load(copy)
    assert len(run.train) == 60
    assert run.series("lm_loss")[1][0] == 42.0


def test_missing_values_leave_gaps(copy):
    with open(copy / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "step": 1000001, "lm_loss": NaN, "mfu": null}\n')
    run = RunRecord.load(copy)
    assert len(run.series("lm_loss")[0]) == 60
    assert run.series("mfu") == ([], [])


@pytest.mark.parametrize("lost", ["config.json", "metrics.jsonl", "summary.json"])
def test_any_one_file_may_be_missing(copy, lost):
    (copy / lost).unlink()
    run = RunRecord.load(copy)
    assert run.name == "mor3"
    assert lost in " ".join(run.notes)
    assert run.last_eval("causal/nll") is not None
    assert run.steps > 0


def test_a_config_of_another_version_is_kept_as_it_is(copy):
    raw = json.loads((copy / "config.json").read_text())
    raw["model"]["flux_capacitor"] = 1
    (copy / "config.json").write_text(json.dumps(raw))
    run = RunRecord.load(copy)
    assert run.config is None
    assert run.config_dict["model"]["flux_capacitor"] == 1
    assert "flux_capacitor" in " ".join(run.notes)


def test_causal_and_topk_are_one_for_a_fixed_depth(tmp_path):
    (tmp_path / "config.json").write_text('{"name": "a"}')
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 5, "causal/nll": 2.5}\n')
    run = RunRecord.load(tmp_path)
    assert run.last_eval("topk/nll") == 2.5
    assert run.last_eval("sampling_accuracy") is None


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_what_is_no_run_is_named(tmp_path, make):
    with pytest.raises(UserError, match=tmp_path.name):
        RunRecord.load(make(tmp_path))
