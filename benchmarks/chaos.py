"""Processes killed at random steps: the job stops and names the victim, and the resumed run is the
uninterrupted one.

    python -m benchmarks.chaos --kills=20 --processes=2,4 --out=benchmarks/results/chaos.json

For each number of processes N: one run that nobody disturbs, on N real processes over loopback
(gloo); then, `kills` times, a run of which one process, chosen at random and process 0 among them,
gets SIGKILL at a random step. The others must leave with status 75 within the time-out and slack
and name the victim; the run is then resumed on 1, 2 or 4 processes in turn. Its losses must be
those of the undisturbed run: bit for bit on N processes, within 1e-5 on another number. Half a
minute to a minute a kill on two idle cores. Each result is written as soon as it is there, to --out
as well; the same command with the same --out goes on after the kills that it holds. A table at the
end; exits with 1 if anything was not as it must be.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1, 2, 4)  # processes a killed run is resumed on
LOST = 75
_KILLS = flags.DEFINE_integer("kills", 20, "Kills for each number of processes.")
_PROCESSES = flags.DEFINE_list("processes", ["2", "4"], "Numbers of processes that are attacked.")
_STEPS = flags.DEFINE_integer("steps", 40, "Steps of a run.")
_TIMEOUT = flags.DEFINE_integer(
    "timeout", 15, "Seconds of silence after which a process counts as lost."
)
_SLACK = flags.DEFINE_integer("slack", 60, "Seconds more that a busy machine may take to stop.")
_SEED = flags.DEFINE_integer("seed", 0, "Of victims and steps.")
_OUT = flags.DEFINE_string(
    "out", None, "JSON file for the results; kills that it holds are not made again."
)


def command(workdir: Path, steps: int) -> list[str]:
    """A Mixture-of-Recursions model of a few thousand parameters, on this repository's own
    sources."""
    model = dict(
        layers=3,
        sharing="cycle",
        prelude=0,
        width=16,
        heads=2,
        kv_heads=1,
        mlp_width=32,
        context=32,
        loss_chunk=0,
    )
    train = dict(
        steps=steps, batch_size=4, log_every=1, eval_every=20, eval_rows=4, checkpoint_every=5
    )
    data = dict(
        source="files", paths=(str(ROOT / "mor_jax/model/*.py"),), tokenizer="bytes", holdout=0.2
    )
    groups = {"model": model, "train": train, "data": data}
    overrides = [
        f"--config.{g}.{k}={v!r}" if not isinstance(v, str) else f"--config.{g}.{k}={v}"
        for g, fields in groups.items()
        for k, v in fields.items()
    ]
    return [
        sys.executable,
        "-m",
        "launch.train",
        "--config",
        "configs/quickstart.py",
        "--workdir",
        str(workdir),
        *overrides,
    ]


class Job:
    """`count` processes of one command; what they print is kept in files."""

    def __init__(self, argv: list[str], count: int, timeout: int, logs: Path):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("JAX_NUM_", "JAX_PROCESS_", "JAX_COORD"))
        }
        env = env | {
            "JAX_PLATFORMS": "cpu",
            "MOR_JAX_HOST_TIMEOUT": str(timeout),
            "PYTHONPATH": str(ROOT),
        }
        env.pop("XLA_FLAGS", None)
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            of_job = (
                {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(rank),
                }
                if count > 1
                else {}
            )
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(
                        argv, env=env | of_job, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
                    )
                )

    def wait(self, seconds: float) -> list[int | None]:
        """Exit status of each; None for one that is still there after `seconds`, and is then
        killed."""
        end = time.monotonic() + seconds
        found: list[int | None] = []
        for process in self.processes:
            try:
                found.append(process.wait(max(end - time.monotonic(), 0.01)))
            except subprocess.TimeoutExpired:
                found.append(None)
        self.end()
        return found

    def end(self) -> None:
        """Kill whoever is left."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def text(self, rank: int) -> str:
        return self.logs[rank].read_text(errors="replace")


def losses(workdir: Path) -> dict[int, float]:
    """{step: loss} so far."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"}


def whole(argv: list[str], count: int, logs: Path, timeout: int) -> None:
    job = Job(argv, count, timeout, logs)
    try:
        status = job.wait(1200)
    finally:
        job.end()
    if any(status):
        raise SystemExit(
            f"a run on {count} processes that nobody disturbed ended with {status}:\n{job.text(0)[-3000:]}"
        )


def attack(
    count: int,
    victim: int,
    at: int,
    again: int,
    reference: dict[int, float],
    place: Path,
    argv_of: Callable,
) -> dict[str, Any]:
    """One kill of process `victim` after step `at`, and one resumption on `again` processes; what
    was seen."""
    workdir = place / "run"
    job = Job(argv_of(workdir), count, _TIMEOUT.value, place / "killed")
    try:
        while max(losses(workdir), default=0) < at:
            if any(p.poll() is not None for p in job.processes):
                raise SystemExit(f"ended before step {at}:\n{job.text(0)[-3000:]}")
            time.sleep(0.02)
        job.processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        status = job.wait(_TIMEOUT.value + _SLACK.value)
        seconds = time.monotonic() - killed
    finally:
        job.end()
    pid = job.processes[victim].pid
    others = [r for r in range(count) if r != victim]
    named = [
        r for r in others if f"process {victim} (" in job.text(r) and f"pid {pid})" in job.text(r)
    ]
    whole(argv_of(workdir), again, place / "resumed", _TIMEOUT.value)
    found = losses(workdir)
    difference = (
        max(abs(found[s] - reference[s]) for s in reference)
        if found.keys() == reference.keys()
        else None
    )
    limit = 0.0 if again == count else 1e-5
    good = (
        named == others
        and all(status[r] == LOST for r in others)
        and difference is not None
        and difference <= limit
    )
    return {
        "processes": count,
        "victim": victim,
        "step": at,
        "status": status,
        "stopped_after_s": round(seconds, 1),
        "named_by": named,
        "resumed_on": again,
        "largest_difference": difference,
        "good": good,
        **({} if good else {"log": job.text(others[0])[-2000:]}),
    }


def run(place: Path, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The results, one after the other; those in `done` are there already."""
    for count in map(int, _PROCESSES.value):
        rng = random.Random(_SEED.value + count)
        kept = sum(r["processes"] == count for r in done)
        reference: dict[int, float] = {}
        for number in range(_KILLS.value):
            victim, at = rng.randrange(count), rng.randrange(5, _STEPS.value - 10)
            if number < kept:
                continue
            if not reference:
                undisturbed = place / f"whole{count}"
                whole(
                    command(undisturbed, _STEPS.value), count, place / "whole_logs", _TIMEOUT.value
                )
                reference = losses(undisturbed)
                assert sorted(reference) == list(range(1, _STEPS.value + 1))
            here = place / f"{count}_{number}"
            again = [count, *(c for c in COUNTS if c != count)][number % len(COUNTS)]
            yield attack(
                count, victim, at, again, reference, here, lambda w: command(w, _STEPS.value)
            )
            shutil.rmtree(here)


def recorded() -> list[dict[str, Any]]:
    """Kills that the file of results holds, if it is one of runs like this one."""
    path = Path(_OUT.value) if _OUT.value else None
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if (found["steps"], found.get("seed")) != (_STEPS.value, _SEED.value):
        raise SystemExit(
            f"{path} has {found['steps']} steps and seed {found.get('seed')}; give another --out."
        )
    return found["kills"]


def table(results: list[dict[str, Any]]) -> str:
    """What a person wants to know of each number of processes."""
    lines = [
        "| processes | kills | as they must be | stopped after, s | resumed on | largest difference |"
    ]
    lines.append("|---:|---:|---:|---|---|---:|")
    for count in sorted({r["processes"] for r in results}):
        of = [r for r in results if r["processes"] == count]
        seconds, worst = [r["stopped_after_s"] for r in of], [r["largest_difference"] for r in of]
        on = ", ".join(map(str, sorted({r["resumed_on"] for r in of})))
        differ = "not all steps" if None in worst else f"{max(worst):.1e}"
        good, spread = sum(r["good"] for r in of), f"{min(seconds)} to {max(seconds)}"
        lines.append(f"| {count} | {len(of)} | {good} | {spread} | {on} | {differ} |")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    results = recorded()
    with tempfile.TemporaryDirectory(prefix="mor_jax_chaos_") as directory:
        for result in run(Path(directory), results):
            results.append(result)
            print(json.dumps(result), flush=True)
            if _OUT.value:
                kept = {"steps": _STEPS.value, "seed": _SEED.value, "kills": results}
                Path(_OUT.value).write_text(json.dumps(kept, indent=1) + "\n")
    bad = [r for r in results if not r["good"]]
    print(table(results))
    print(f"{len(results) - len(bad)} of {len(results)} as they must be")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    app.run(main)
