"""Two processes and one run directory: one works, the other is told whose it is, and a lock of the
dead holds nobody up."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from object_store import serve
from train.tiny_run import ROOT, records, run, start, wait_for_step, write_config, write_corpus

from mor_jax.errors import UserError
from mor_jax.paths import as_path, filesystem
from mor_jax.train import lock as locks
from mor_jax.train.lock import FILE, InUse, hold

HOLD = """
import sys, time
from mor_jax.paths import as_path
from mor_jax.train.lock import hold
with hold(as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["flock", "lease", "s3"])
def place(request, tmp_path, monkeypatch):
    """A run directory: with locks of the file system, without, and in an object store. A beat is a
    fifth of a second."""
    monkeypatch.setenv(locks.ENV, "0.2")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if request.param == "flock":
        yield as_path(tmp_path / "run")
    elif request.param == "lease":
        monkeypatch.setattr(locks, "_flock", lambda file: None)
        yield as_path(tmp_path / "run")
    else:
        with serve("s3") as store:
            for name, value in store.env.items():
                monkeypatch.setenv(name, value)
            filesystem(store.root).clear_instance_cache()
            yield as_path(f"{store.root}/run")


def other(place, code=HOLD):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(place)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_whose_it_is_and_the_directory_is_left_alone(place):
    process = other(place)
    try:
        began = time.monotonic()
        with (
            pytest.raises(
                InUse, match=rf"{place} is in use .*pid {process.pid}, since \d{{4}}-.*--workdir"
            ),
            hold(place),
        ):
            pass
        assert time.monotonic() - began < 60  # it saw a sign of life; it did not wait for the end
        assert json.loads((place / FILE).read_text())["pid"] == process.pid
    finally:
        process.kill()
        process.wait()


def test_a_killed_holder_holds_nobody_up(place):
    process = other(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with hold(place) as lock:
        assert json.loads((place / FILE).read_text())["pid"] == os.getpid()
        lock.check()
    assert not (place / FILE).exists()


def test_one_that_waits_gets_it_when_the_other_has_ended(place):
    said = []
    process = other(place, HOLD.replace("600", "3"))
    with hold(place, wait=120, say=said.append):
        assert process.wait(timeout=10) == 0
    assert len(said) == 1 and f"pid {process.pid}" in said[0]


def test_a_silent_holder_of_another_host_loses_it(place, monkeypatch):
    """Its pid says nothing here: only that its number stands still. A file system's own lock, where
    it has one, is free."""
    place.mkdir(parents=True, exist_ok=True)
    foreign = {
        "host": "elsewhere",
        "pid": os.getpid(),
        "namespace": "",
        "since": "then",
        "id": "x",
        "beat": 7,
    }
    (place / FILE).write_text(json.dumps(foreign))
    said, began = [], time.monotonic()
    with hold(place, say=said.append):
        assert time.monotonic() - began > locks.EXPIRES * 0.2
    assert "elsewhere" in said[0]


def test_who_refuses_leaves_what_was_there(place):
    place.mkdir(parents=True, exist_ok=True)
    old = json.dumps({"host": "h", "pid": 1, "id": "", "since": "then"}).encode()
    (place / FILE).write_bytes(old)
    with pytest.raises(UserError, match="no"), hold(place):
        raise UserError("no")
    assert (place / FILE).read_bytes() == old


def test_a_holder_that_was_taken_for_dead_stops(place):
    with hold(place) as lock:
        (place / FILE).write_text(
            json.dumps({"host": "elsewhere", "pid": 5, "since": "now", "id": "y", "beat": 0})
        )
        end = time.monotonic() + 60
        with pytest.raises(InUse, match=r"taken by another process .*elsewhere, pid 5"):
            while time.monotonic() < end:
                lock.check()
                time.sleep(0.05)
    # and does not take it from them
    assert json.loads((place / FILE).read_text())["host"] == "elsewhere"


def test_of_many_at_once_one_gets_it(place):
    """Eight processes, all at the lock of a dead one: never two inside."""
    place.mkdir(parents=True, exist_ok=True)
    (place / FILE).write_text("half a docu")
    context = multiprocessing.get_context("spawn")
    inside, most = context.Value("i", 0), context.Value("i", 0)
    racers = [context.Process(target=race, args=(str(place), inside, most)) for _ in range(4)]
    for process in racers:
        process.start()
    for process in racers:
        process.join(240)
        assert process.exitcode == 0
    assert most.value == 1


def race(place, inside, most):
    with hold(as_path(place), wait=200, say=lambda line: None):
        with inside.get_lock():
            inside.value += 1
            most.value = max(most.value, inside.value)
        time.sleep(0.5)
        with inside.get_lock():
            inside.value -= 1


def test_two_starts_of_one_run(tmp_path):
    """The second refuses before it does anything, and the first ends with every line of its
    curve."""
    config = write_config(tmp_path, write_corpus(tmp_path))
    args = ["--config", config, "--workdir", tmp_path / "run"]
    first = start("train", *args)
    try:
        wait_for_step(first, tmp_path / "run", 5)
        second = run("train", *args)
        assert (
            second.returncode == 2
            and f"pid {first.pid}" in second.stderr
            and "Traceback" not in second.stderr
        )
        assert "Resuming" not in second.stderr
    finally:
        first.wait(timeout=240)
    assert first.returncode == 0
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 121))
