"""Bad steps: what the policies do, that a resumed run judges alike, and where the time goes."""

import json
import math
import os
import re
import runpy
import shutil
import signal

import numpy as np
import pytest
from train.tiny_run import records, write_config, write_corpus

from mor_jax.config import TrainConfig, from_config_dict
from mor_jax.data.loader import Loader
from mor_jax.errors import ConfigError, DataError
from mor_jax.train import faults as faults_module
from mor_jax.train.faults import OK, REWIND, SKIP, Faults, TrainingError
from mor_jax.train.goodput import Goodput, stragglers, summarize
from mor_jax.train.loop import train
from mor_jax.train.metrics import MetricWriter

INF = np.float32(np.inf)


def kept():
    return "the last good checkpoint is of step 7"


TIMING = {"time_s", "tokens_per_s", "flops_per_s", "mfu"}


def values(loss, **more):
    return {"loss": loss, "grad_norm": 1.0, "update_norm": 1.0} | more


def cfg(**fields):
    return (
        TrainConfig(steps=100, spike_threshold=0.5)
        if not fields
        else TrainConfig(steps=100, **fields)
    )


def fed(config, losses, first=1):
    """A judge that has seen these losses."""
    faults = Faults(config)
    for step, loss in enumerate(losses, first):
        assert faults.judge(step, values(loss), INF, kept) == (OK, "")
    return faults


def test_the_limit_is_the_median_of_steps_that_are_surely_done():
    faults = fed(cfg(), [3.0] * 9 + [2.0] * 6)
    assert faults.limit(16) == INF  # fewer than 16 are surely done
    faults.judge(16, values(1.0), INF, kept)
    assert faults.limit(17) == INF and faults.limit(18) == np.float32(3.0 + 0.5)
    faults = fed(cfg(), list(range(1, 201)))  # of step s the loss is s
    assert faults.limit(201) == np.float32(np.median(range(136, 200)) + 0.5)  # 64 steps up to 199
    assert fed(cfg(spike_threshold=0.0), [1.0] * 50).limit(52) == INF


def test_policies_by_name_and_by_kind():
    spike, nan = values(9.0), values(math.nan, grad_norm=math.nan)
    limit = np.float32(3.0)
    verdict, why = Faults(cfg(on_spike="skip")).judge(5, spike, limit, kept)
    assert (
        verdict == SKIP
        and why == "the loss jumped to 9 at step 5, above the limit of 3; its update was skipped."
    )
    assert Faults(cfg(on_spike="rewind")).judge(5, spike, limit, kept)[0] == REWIND
    with pytest.raises(
        TrainingError, match=r"jumped to 9 at step 5.*on_spike = 'stop'.*checkpoint is of step 7"
    ):
        Faults(cfg(on_spike="stop")).judge(5, spike, limit, kept)
    assert Faults(cfg(on_nonfinite="skip")).judge(5, nan, INF, kept)[0] == SKIP
    assert Faults(cfg(on_nonfinite="rewind")).judge(5, nan, INF, kept)[0] == REWIND
    with pytest.raises(TrainingError, match=r"loss is nan at step 5.*on_nonfinite = 'stop'") as e:
        Faults(cfg()).judge(5, nan, INF, kept)
    assert e.value.everywhere
    with pytest.raises(TrainingError, match="update_norm is inf"):
        Faults(cfg()).judge(5, values(1.0, update_norm=math.inf), INF, kept)


def test_help_that_does_not_help_ends():
    faults = Faults(cfg(on_nonfinite="skip"))
    for step in range(1, faults_module.IN_A_ROW):
        assert faults.judge(step, values(math.inf), INF, kept)[0] == SKIP
    with pytest.raises(TrainingError, match="the 10th bad step in a row"):
        faults.judge(10, values(math.inf), INF, kept)
    faults = Faults(cfg())
    for bad in (25, 24, 23):
        faults.rewind(bad, 20)
    faults.rewind(35, 30)  # another checkpoint
    with pytest.raises(TrainingError, match="step 22 is bad again after 3 rewinds to step 20"):
        faults.rewind(22, 20)


def test_a_rewind_leaves_out_the_rows_up_to_the_bad_step_and_travels():
    faults = fed(cfg(on_spike="rewind"), [3.0] * 24)
    assert faults.position(25) == 24
    faults.rewind(25, 20)
    # 20 .. 24 were those of steps 21 .. 25
    assert [faults.position(s) for s in (21, 22)] == [25, 26]
    again = Faults(cfg(on_spike="rewind"), json.loads(json.dumps(faults.state())))
    assert (
        again.position(21) == 25
        and again.limit(22) == faults.limit(22)
        and again.state() == faults.state()
    )
    assert [s for s, _ in faults.state()["losses"]] == list(range(1, 21))


def test_unknown_policies_are_refused():
    with pytest.raises(
        ConfigError, match=r"config.train.on_spike must be one of skip, rewind, stop; got 'skpi'"
    ):
        from_config_dict({"train": {"steps": 1, "on_spike": "skpi"}})
    with pytest.raises(ConfigError, match="spike_threshold"):
        from_config_dict({"train": {"steps": 1, "spike_threshold": -1.0}})


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(directory, a call that gives the configuration of a run with these fields of `train`)"""
    directory = tmp_path_factory.mktemp("faults")
    get_config = runpy.run_path(str(write_config(directory, write_corpus(directory))))["get_config"]

    def config(**fields):
        raw = get_config("vanilla").to_dict()
        shared = dict(steps=40, eval_every=0, checkpoint_every=10, batch_size=2)
        # Small batches and no warm-up: losses that go up and down.
        return from_config_dict(
            raw | {"train": raw["train"] | shared | fields, "optim": dict(peak_lr=3e-2, warmup=0.0)}
        )

    return directory, config


def curve(workdir):
    return {
        r["step"]: {k: v for k, v in r.items() if k not in TIMING}
        for r in records(workdir, "train")
    }


@pytest.fixture(scope="module")
def skipping(tiny):
    directory, config = tiny
    train(config(spike_threshold=0.02, on_spike="skip"), directory / "skipping", progress=False)
    return directory / "skipping"


def test_spikes_are_skipped_and_a_resumed_run_skips_the_same(tiny, skipping):
    directory, config = tiny
    events = records(skipping, "event")
    assert events and all(
        e["event"] == SKIP and "its update was skipped" in e["why"] for e in events
    )
    found = curve(skipping)
    for e in events:  # what was skipped changed nothing, and the rate waited for it
        assert found[e["step"]]["loss"] > 0
        if e["step"] > 1:
            assert found[e["step"]]["param_norm"] == found[e["step"] - 1]["param_norm"]
    # Stop after step 30 by forgetting what came later, as a crash would.
    workdir = directory / "again"
    shutil.copytree(skipping, workdir)
    shutil.rmtree(workdir / "checkpoints" / "40")
    (workdir / "summary.json").unlink()
    train(config(spike_threshold=0.02, on_spike="skip"), workdir, progress=False)
    assert curve(workdir) == found and records(workdir, "event") == events
    goodput = json.loads((workdir / "summary.json").read_text())["goodput"]
    assert goodput["starts"] == 2 and goodput["steps_again"] == 10 and goodput["share/again"] > 0
    assert math.isclose(
        sum(v for k, v in goodput.items() if k.startswith("share/")), 1.0, rel_tol=1e-6
    )


def test_a_rewind_goes_back_and_on_with_other_rows(tiny, skipping, monkeypatch):
    directory, config = tiny
    bad = records(skipping, "event")[0]["step"]
    good = (bad - 1) // 10 * 10
    asked = []
    plain = Loader.iter_from_step
    monkeypatch.setattr(
        Loader, "iter_from_step", lambda self, step: asked.append(step) or plain(self, step)
    )
    workdir = directory / "rewinding"
    try:
        train(config(spike_threshold=0.02, on_spike="rewind"), workdir, progress=False)
    except TrainingError as e:
        assert "is bad again after 3 rewinds" in str(e)
    assert asked[:2] == [0, bad]  # batch `bad` is the first that no step has seen
    event = records(workdir, "event")[0]
    assert (event["event"], event["step"], event["from"]) == (REWIND, good, bad)
    before, found = curve(skipping), curve(workdir)
    assert all(found[s] == before[s] for s in range(1, good + 1))
    assert found[good + 1] != before[good + 1]
    assert (workdir / "checkpoints" / str(good)).is_dir()


def test_goodput_counts_every_second_once(tmp_path):
    path = tmp_path / "goodput.json"
    first = Goodput(path)
    with first.during("save"):
        assert first.enter("save") == "save"
    first.enter("step")
    first.step(1)
    first.step(8)
    first.write()
    entry = json.loads(path.read_text())[0]
    assert (entry["first"], entry["last"]) == (1, 8)
    again = [entry | {"seconds": entry["seconds"] | {"step": 8.0}, "end": entry["begin"] + 10.0}]
    again.append(again[0] | {"begin": entry["begin"] + 15.0, "first": 5, "last": 10})
    found = summarize(again)
    assert found["steps_again"] == 4 and found["starts"] == 2
    assert math.isclose(found["share/again"] * found["wall_s"], 4.0)
    assert math.isclose(found["share/down"] * found["wall_s"], 5.0)
    assert math.isclose(found["goodput"] * found["wall_s"], 12.0)
    path.write_text("[{}]")
    assert Goodput(path).record()["starts"] == 1  # a file that is none of ours is nothing


def test_a_straggler_is_named():
    def report(own):
        return {"own_s": own, "input_s": own / 2, "step_s": 1.0}

    names = ["a", "b", "c"]
    assert stragglers([report(0.2), report(0.21), report(0.6)], names)["slow"] == ["c"]
    # nothing beside the step
    assert stragglers([report(0.001), report(0.001), report(0.003)], names)["slow"] == []
    assert stragglers([report(0.2), {}, report(0.6)], names) == {} == stragglers([], [])


def test_a_damaged_row_ends_the_run_with_its_name_and_harms_no_checkpoint(
    tiny, monkeypatch, tmp_path
):
    """Rows are damaged on disk between two starts of a run; put right again, it goes on as if
    nothing had been."""
    directory, config = tiny
    monkeypatch.setenv("MOR_JAX_CACHE", str(tmp_path))
    whole, run = directory / "rows_whole", directory / "rows_damaged"
    train(config(), whole, progress=False)

    write = MetricWriter.write

    def stopping(self, kind, step, values):
        write(self, kind, step, values)
        if kind == "train" and step == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "write", stopping)
        stopped = train(config(), run, progress=False)
    (rows,) = tmp_path.glob("data/*/rows/*train*")
    good = rows.read_bytes()
    assert len(good) > 70_000  # the records begin at 64 KiB
    rows.write_bytes(good[:65_600] + bytes(len(good) - 67_600) + good[-2_000:])
    with pytest.raises(
        DataError, match=rf"{re.escape(str(rows))}, record \d+ .*damaged.*Delete the directory"
    ):
        train(config(), run, progress=False)
    checkpoints = sorted(int(p.name) for p in (run / "checkpoints").iterdir())
    assert checkpoints == [10, stopped["step"]]
    rows.write_bytes(good)
    assert train(config(), run, progress=False)["finished"]
    assert curve(run) == curve(whole)
