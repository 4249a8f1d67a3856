"""Trackers: what they are given, what happens when one fails or is missing, and that a resumed run
stays one run."""

import json
import sys
import types

import pytest

from mor_jax.errors import ConfigError, UserError
from mor_jax.train.metrics import MetricWriter
from mor_jax.train.trackers import IDS, TrackedRun, open_trackers


class Own:
    """A tracker that remembers, and fails at step 3."""

    seen: list = []  # noqa: RUF012

    def __init__(self, run):
        self.run = run

    def write(self, kind, step, values):
        if step == 3:
            raise OSError("the network is gone")
        self.seen.append((self.run.name, kind, step, dict(values)))

    def flush(self):
        pass

    def close(self):
        self.seen.append("closed")


def run(directory, step=0):
    return TrackedRun("mine", {"model": {"width": 8}, "name": "mine"}, directory, step)


def test_a_tracker_of_ones_own_gets_finite_numbers_and_may_fail(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_trackers", types.SimpleNamespace(make=Own))
    Own.seen, said = [], []
    writer = MetricWriter(
        tmp_path, trackers=open_trackers(["own_trackers:make"], run(tmp_path)), say=said.append
    )
    for step in (1, 2, 3, 4):
        writer.write(
            "train",
            step,
            {"loss": float(step), "bad": float("nan"), "by_depth": [1.0], "mfu": None},
        )
    writer.close()
    assert Own.seen == [("mine", "train", 1, {"loss": 1.0}), ("mine", "train", 2, {"loss": 2.0})]
    assert len(said) == 1 and "own_trackers:make" in said[0] and "the network is gone" in said[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4, "nothing is lost"


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'{name}.*pip install "\.\[{name}\]"'):
        open_trackers([name], run(tmp_path))


@pytest.mark.parametrize("name", ["tensorbord", "nowhere.at_all:make", "json:nothing"])
def test_an_unknown_tracker_is_named(name, tmp_path):
    with pytest.raises(ConfigError, match=name):
        open_trackers([name], run(tmp_path))


def test_mlflow_holds_one_run_over_a_resumption(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for step in (0, 2):
        [tracker] = open_trackers(["mlflow"], run(tmp_path, step)).values()
        tracker.write("train", step + 1, {"loss": 1.0 + step})
        tracker.close()
    made = json.loads((tmp_path / IDS).read_text())["mlflow"]
    client = mlflow.MlflowClient()
    history = [(m.step, m.value) for m in client.get_metric_history(made, "train/loss")]
    found = client.get_run(made)
    assert history == [(1, 1.0), (3, 3.0)] and found.info.status == "FINISHED"
    assert found.data.params["model.width"] == "8"


def test_wandb_gets_records_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    [tracker] = open_trackers(["wandb"], run(tmp_path)).values()
    tracker.write("train", 1, {"loss": 1.0})
    assert tracker._run.id == json.loads((tmp_path / IDS).read_text())["wandb"]
    assert tracker._run.summary["train/loss"] == 1.0
    tracker.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
