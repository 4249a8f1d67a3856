"""Two real processes over loopback: they train, evaluate and save together, stop together, and name
the one that dies.

`benchmarks/chaos.py` does the same many times, on more processes and at random steps.
"""

import json
import os
import runpy
import signal
import socket
import subprocess

import pytest
from train.tiny_run import (
    ROOT,
    command,
    environment,
    records,
    wait_for_step,
    write_config,
    write_corpus,
)

from mor_jax.config import from_config_dict
from mor_jax.parallel.multihost import LOST
from mor_jax.train.loop import train

STEPS, EVERY = 120, 20
TIMING = {"time_s", "tokens_per_s", "flops_per_s", "mfu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    return directory, write_config(directory, write_corpus(directory))


def config(place):
    raw = runpy.run_path(str(place[1]))["get_config"]("vanilla").to_dict()
    return from_config_dict(raw | {"train": raw["train"] | {"steps": STEPS}})


def start_two(place, workdir):
    """Both processes of `launch.train`, their output in <workdir>.<rank>."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    found = []
    for rank in (0, 1):
        env = environment(
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(rank),
            MOR_JAX_HOST_TIMEOUT="30",
        )
        argv = command(
            "train",
            "--config",
            f"{place[1]}:vanilla",
            "--workdir",
            workdir,
            f"--config.train.steps={STEPS}",
        )
        with open(f"{workdir}.{rank}", "w") as out:
            found.append(
                subprocess.Popen(argv, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
            )
    return found


def said(workdir, rank):
    with open(f"{workdir}.{rank}") as f:
        return f.read()


def curve(workdir):
    """{(kind, step): record without the times}"""
    kinds = {kind: records(workdir, kind) for kind in ("train", "eval")}
    return {
        (k, r["step"]): {n: v for n, v in r.items() if n not in TIMING}
        for k, rs in kinds.items()
        for r in rs
    }


@pytest.fixture(scope="module")
def run(place):
    """(directory, what happened): stopped by SIGTERM to process 1, resumed, process 1 killed,
    resumed on one process."""
    workdir, seen = place[0] / "run", {}
    two = start_two(place, workdir)
    try:
        wait_for_step(two[0], workdir, 30)
        two[1].send_signal(signal.SIGTERM)
        seen["stopped"] = [p.wait(timeout=200) for p in two]
        seen["stopped_text"] = said(workdir, 0)
        seen["stopped_at"] = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
        seen["stopped_steps"] = max(step for _, step in curve(workdir))
        two = start_two(place, workdir)
        wait_for_step(two[0], workdir, seen["stopped_at"] + 30)
        seen["victim"] = two[1].pid
        two[1].send_signal(signal.SIGKILL)
        seen["killed"] = [p.wait(timeout=200) for p in two]
        seen["killed_text"] = said(workdir, 0)
        seen["killed_steps"] = max(step for _, step in curve(workdir))
    finally:
        for process in two:
            if process.poll() is None:
                process.kill()
            process.wait()
    seen["summary"] = train(config(place), workdir, progress=False)
    return workdir, seen


def test_sigterm_to_one_saves_the_same_step_on_both_and_exits_with_0(run):
    _, seen = run
    assert seen["stopped"] == [0, 0], seen["stopped_text"]
    assert 30 <= seen["stopped_at"] == seen["stopped_steps"] < STEPS
    assert (
        f"Stopped by SIGTERM to one of the processes after step {seen['stopped_at']}; saved."
        in seen["stopped_text"]
    )


def test_a_killed_process_is_named_by_the_other(run):
    _, seen = run
    assert seen["killed"] == [LOST, -signal.SIGKILL], seen["killed_text"]
    assert f"Resuming {run[0]} after step {seen['stopped_at']}." in seen["killed_text"]
    [line] = [line for line in seen["killed_text"].splitlines() if line.startswith("error: ")]
    assert (
        "no heartbeat" in line
        and f"from process 1 ({socket.gethostname()}, pid {seen['victim']}), last at step" in line
    )
    assert (
        "process 0 (" in line
        and "the same command goes on from there, on any number of processes" in line
    )


def test_one_process_goes_on_and_the_curve_is_that_of_a_run_nobody_disturbed(place, run):
    workdir, seen = run
    assert seen["summary"]["finished"] and seen["summary"]["goodput"]["starts"] == 3
    train(config(place), place[0] / "whole", progress=False)
    found, whole = curve(workdir), curve(place[0] / "whole")
    assert found.keys() == whole.keys() and max(found) == ("train", STEPS)
    assert ("eval", EVERY) in found and seen["killed_steps"] > seen["stopped_at"]
    for key, record in whole.items():
        for name in ("loss", "causal/nll", "lr"):
            if name in record:
                assert abs(found[key][name] - record[name]) <= 1e-5, (key, name)
    hosts = [
        r
        for r in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        if r["kind"] == "hosts"
    ]
    assert hosts and all(len(r["own_s"]) == len(r["step_s"]) == 2 for r in hosts)
    assert not os.path.exists(workdir / "profile")
