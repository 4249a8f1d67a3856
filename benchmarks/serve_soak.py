"""Sixty-four clients on a model server for ten minutes: good requests, cancels, disconnects,
rubbish, slow-loris.

    python -m benchmarks.serve_soak  # trains a small model for a few steps first
    python -m benchmarks.serve_soak --checkpoint runs/mor --minutes 1 --clients 16

Every good request must come to its only right answer or be refused with 429; afterwards nothing may
be left in the server: no lane, no waiting sequence, no task, no key-value memory but the prefix
cache's, no descriptor, no thread, no growing memory, no program compiled. Then it is killed
(SIGKILL) and started again, and the time until it is ready is told.
Exit status 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import record
from benchmarks.serve_load import quantiles
from benchmarks.serve_soak_clients import Clients
from mor_jax.errors import UserError

SMALLEST = 128
# share of its memory that a server may grow by, between the first quarter of the time and the end
# ...
GROWTH = 0.10
# ... and so many bytes beyond: pools of the allocator, caches of compiled grammars
SLACK = 64 << 20
IDLE = {
    "vllm:num_requests_running": 0,
    "vllm:num_requests_waiting": 0,
    "mor_jax:open_requests": 0,
    "mor_jax:lane_occupancy": 0,
}


class Server:
    """`launch.serve` as a process of its own."""

    def __init__(self, checkpoint: str, flags: list[str]):
        command = [
            sys.executable,
            "-m",
            "launch.serve",
            f"soak={checkpoint}",
            "--port",
            "0",
            *flags,
        ]
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - it lives as long as the server
        began = time.monotonic()
        self.process = subprocess.Popen(command, stderr=self.log, stdout=self.log, cwd=record.ROOT)
        self.port = int(self._wait_for(r"listening at http://127\.0\.0\.1:(\d+)"))
        self._wait_for(r"^(ready): ")
        self.seconds = time.monotonic() - began
        assert self.get("/health")[0] == 200

    def _wait_for(self, pattern: str, seconds: float = 600) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.output(), re.MULTILINE):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise UserError(f"the server did not start: {self.output()[-1000:]}")

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=30
            ) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    def metrics(self) -> dict[str, float]:
        """Unlabelled, or of the one model."""
        found = {}
        for text in self.get("/metrics")[1].splitlines():
            name, _, value = text.rpartition(" ")
            if text[:1] != "#" and name and 'le="' not in name:
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found

    def state(self) -> dict[str, float]:
        """What the process has that it could leak."""
        root = Path(f"/proc/{self.process.pid}")
        rss = int((root / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def count(folder):
            return len(list((root / folder).iterdir()))

        metrics = self.metrics()
        return {
            "rss": rss,
            "descriptors": count("fd"),
            "threads": count("task"),
            "at": time.monotonic(),
            "tasks": metrics["mor_jax:asyncio_tasks"],
            "compilations": metrics.get("mor_jax:compilations_total", 0),
        }

    def settle(self, seconds: float = 60) -> list[str]:
        """What is still busy after so long; nothing, if all is well."""
        end = time.monotonic() + seconds
        while True:
            metrics = self.metrics()
            busy = [
                f"{name} is {metrics[name]:g}"
                for name, want in IDLE.items()
                if metrics.get(name, want) != want
            ]
            if not busy or time.monotonic() > end:
                return busy
            time.sleep(0.2)

    def stop(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


def soak(server: Server, *, clients: int, seconds: float, seed: int, tell: Any) -> dict[str, Any]:
    """The clients, and what they leave behind."""
    _, raw = server.get("/v1/models")
    model = json.loads(raw)["data"][0]
    if model["max_model_len"] < SMALLEST:
        raise UserError(
            f"the soak needs a context of {SMALLEST} tokens at least, this model has {model['max_model_len']}."
        )
    crowd = Clients(server.port, model["id"], model["max_model_len"], seed=seed)
    # what is allocated once is allocated now
    asyncio.run(crowd.run(min(clients, 8), _until(min(10.0, seconds / 4))))
    problems = server.settle()
    before = server.state()
    crowd.tally.ttft.clear()
    crowd.tally.gaps.clear()
    began, rounds, states = time.monotonic(), 8, []
    for i in range(rounds):
        asyncio.run(crowd.run(clients, _until(seconds / rounds)))
        problems += server.settle()
        states.append(server.state())
        tally = crowd.tally
        tell(
            f"{i + 1}/{rounds}: {sum(tally.done.values())} done, {sum(tally.refused.values())} refused, "
            f"{len(tally.violations)} wrong, {states[-1]['rss'] / 1e6:.0f} MB"
        )
        crowd.seed += 1
    after = states[-1]
    for name in ("descriptors", "threads", "tasks"):
        # a connection that is just being closed, an idle worker of a pool
        if after[name] > before[name] + 3:
            problems.append(f"{name}: {before[name]:g} before, {after[name]:g} after")
    if after["rss"] > states[rounds // 4 - 1]["rss"] * (1 + GROWTH) + SLACK:
        problems.append(
            f"memory grew from {states[1]['rss'] / 1e6:.0f} to {after['rss'] / 1e6:.0f} MB"
        )
    if after["compilations"] != before["compilations"]:
        problems.append(
            f"{after['compilations'] - before['compilations']:g} programs were compiled while serving"
        )
    if server.get("/health")[0] != 200:
        problems.append("not healthy afterwards")
    tally, metrics = crowd.tally, server.metrics()
    return {
        "clients": clients,
        "seconds": round(time.monotonic() - began, 1),
        "done": dict(tally.done),
        "refused": dict(tally.refused),
        "violations": tally.violations,
        "problems": problems,
        "ttft_ms": quantiles(tally.ttft),
        "token_ms": quantiles(tally.gaps),
        "tokens": tally.tokens,
        "answers_seen_twice": len(tally.known),
        "before": before,
        "after": after,
        "rss_mb": [round(s["rss"] / 1e6) for s in states],
        "metrics": metrics,
    }


def _until(seconds: float) -> Any:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def small_checkpoint(folder: str) -> str:
    """A model that has seen a little text: its depths differ, which is all that is needed of it."""
    command = [
        sys.executable,
        "-m",
        "launch.train",
        "--config",
        "configs/quickstart.py",
        "--workdir",
        f"{folder}/run",
        "--config.train.steps=30",
        "--config.train.flops=0",
        "--config.model.width=96",
    ]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the small model could not be trained: {done.stderr[-1000:]}")
    return f"{folder}/run"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_soak",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--checkpoint", help="default: a small one is trained for a few steps")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--flag",
        action="append",
        default=[],
        help="one more of launch.serve, e.g. --flag=--lanes=16",
    )
    parser.add_argument(
        "--out", type=Path, default=record.ROOT / "benchmarks" / "results" / "serve_soak.json"
    )
    args = parser.parse_args(argv)
    console, status = Console(), Console(stderr=True)

    def tell(line):
        return status.print(line, markup=False, highlight=False)

    server = None
    try:
        record.claim(args.out)
        with tempfile.TemporaryDirectory(prefix="serve-soak-") as folder:
            checkpoint = args.checkpoint or small_checkpoint(folder)
            server = Server(checkpoint, args.flag)
            tell(f"ready after {server.seconds:.1f} s")
            result = soak(
                server, clients=args.clients, seconds=60 * args.minutes, seed=args.seed, tell=tell
            )
            first = server.seconds
            server.stop(signal.SIGKILL)
            server = Server(checkpoint, args.flag)
            result |= {
                "start_seconds": round(first, 1),
                "restart_seconds": round(server.seconds, 1),
            }
            code = server.stop(signal.SIGTERM)
            if code != 0:
                result["problems"].append(f"exit status {code} after SIGTERM")
    except UserError as e:
        status.print(f"error: {e}", markup=False)
        return 2
    finally:
        if server is not None and server.process.poll() is None:
            server.process.kill()
    show(result, console)
    versions = {"python": platform.python_version(), "kernel": platform.release()}
    facts = {
        "benchmark": "serve_soak",
        "time": record.now(),
        "commit": record.commit(),
        "versions": versions,
    }
    record.write(
        args.out,
        {**facts, "cores": record.cores(), "load": os.getloadavg(), "seed": args.seed, **result},
    )
    console.print(f"Written: {args.out}", markup=False)
    return int(bool(result["violations"] or result["problems"]))


def show(result: dict[str, Any], console: Console) -> None:
    for name in ("done", "refused", "ttft_ms", "token_ms", "rss_mb"):
        console.print(f"{name}: {result[name]}", markup=False)
    console.print(
        f"{result['tokens']} tokens in {result['seconds']:.0f} s; ready {result['start_seconds']} s after the start, and "
        f"{result['restart_seconds']} s after kill -9 and a new start"
    )
    for text in (*result["violations"], *result["problems"]):
        console.print(f"WRONG {text}", markup=False)
    wrong = result["violations"] or result["problems"]
    console.print(
        "[red]it does not hold[/]"
        if wrong
        else "[green]nothing leaked, every request ended as it should[/]"
    )


if __name__ == "__main__":
    sys.exit(main())
