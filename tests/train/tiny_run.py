"""Real commands on a model of a few thousand parameters: for tests of what a person at a terminal
sees."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
from ml_collections import ConfigDict


def get_config(arg=""):
    mor = arg != "vanilla"
    return ConfigDict(
        dict(
            name=arg or "mor",
            model=dict(
                layers=3 if mor else 1, recursions=3 if mor else 1, sharing="cycle" if mor else "none",
                width=16, heads=2, kv_heads=1, mlp_width=32, context=32, loss_chunk=0,
            ),
            depth=dict(policy="expert_choice" if mor else "fixed"),
            data=dict(source="files", paths=({paths!r},), tokenizer="bytes", holdout=0.2, cache_dir=""),
            optim=dict(peak_lr=3e-3, warmup=0.1),
            train=dict(
                steps=120, batch_size=4, log_every=1, eval_every=20, eval_rows=8, checkpoint_every=20,
                keep_checkpoints=3,
            ),
        )
    )
"""


class Trained(NamedTuple):
    """Two finished runs and what they were made of."""

    directory: Path
    config: Path
    mor: Path  # run directories
    vanilla: Path


def write_corpus(directory: Path, documents: int = 60, seed: int = 0) -> Path:
    """`directory`/corpus.jsonl: short documents of made-up words, several to a row."""
    rng = random.Random(seed)
    words = [
        "def",
        "return",
        "loss",
        "step",
        "if",
        "for",
        "x",
        "y",
        "(",
        ")",
        "\n",
        "é",
        "=",
        "value",
        "depth",
    ]
    lines = (
        json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(2, 30)))})
        for _ in range(documents)
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_config(directory: Path, corpus: Path | str) -> Path:
    """A config file of the tiny model on `corpus`; its argument: mor (default) or vanilla."""
    path = directory / "tiny.py"
    path.write_text(CONFIG.replace("{paths!r}", repr(str(corpus))), encoding="utf-8")
    return path


def environment(**extra: str) -> dict[str, str]:
    """Of a command: one plain CPU device, whatever the tests themselves run on."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "COLUMNS": "120"} | extra


def command(name: str, *args: object) -> list[str]:
    return [sys.executable, "-m", f"launch.{name}", *map(str, args)]


# What JAX, Python and our packages may read when they are imported: another process is needed for
# other values.
READ_AT_IMPORT = ("FSSPEC_", "GRPC_", "JAX_", "LANG", "LC_", "MOR_JAX_", "PYTHON", "TF_", "XLA_")


class _Forking(NamedTuple):
    """A process that forks commands (forked.py) and the folder of its socket; it ends when this is
    forgotten."""

    process: subprocess.Popen
    folder: tempfile.TemporaryDirectory

    @property
    def socket(self) -> str:
        return str(Path(self.folder.name) / "socket")


_LOCK = threading.Lock()


@functools.lru_cache(1)
def _forking(env: frozenset[tuple[str, str]]) -> _Forking:
    folder = tempfile.TemporaryDirectory(prefix="forked_")
    program = [
        sys.executable,
        str(Path(__file__).with_name("forked.py")),
        str(Path(folder.name) / "socket"),
    ]
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, env=dict(env)
    )
    assert process.stdout.readline() == b"ready\n"
    return _Forking(process, folder)


def run_forked(
    name: str, args: Sequence[str], env: Mapping[str, str], stdin: bytes = b"", timeout: float = 240
) -> subprocess.CompletedProcess:
    """The command to its end, in a process forked from one that has done the imports in this
    environment."""
    at_import = {k: v for k, v in env.items() if k.startswith(READ_AT_IMPORT)}
    asked = {"args": [name, *args], "cwd": str(ROOT), "env": dict(env)}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(stdin)
        files[0].seek(0)
        others = {k: env[k] for k in ("PATH", "HOME", "TMPDIR") if k in env}
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        with _LOCK:  # tests run commands in threads
            connection.connect(_forking(frozenset((at_import | others).items())).socket)
        line = json.dumps(asked).encode() + b"\n"
        sent = socket.send_fds(connection, [line], [f.fileno() for f in files])
        connection.sendall(line[sent:])
        answer = stack.enter_context(connection.makefile("r"))
        pid = int(answer.readline())
        connection.settimeout(timeout)
        try:
            status = int(answer.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(command(name, *args), timeout) from None
        for f in files[1:]:
            f.seek(0)
        return subprocess.CompletedProcess(
            command(name, *args), status, files[1].read(), files[2].read()
        )


def run(
    name: str, *args: object, stdin: bytes = b"", timeout: float = 240, **env: str
) -> subprocess.CompletedProcess:
    """The command to its end; stdout and stderr as text.

    It is a process of its own, but forked from one that has done the imports, where nothing is to
    be changed in its environment; `start` and `command` are for what only a whole new interpreter
    shows.
    """
    if env or sys.platform != "linux":
        done = subprocess.run(
            command(name, *args),
            input=stdin,
            capture_output=True,
            cwd=ROOT,
            env=environment(**env),
            timeout=timeout,
        )
    else:
        done = run_forked(name, tuple(map(str, args)), environment(), stdin, timeout)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def start(name: str, *args: object) -> subprocess.Popen:
    """The command in the background, its output to be thrown away."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(
        command(name, *args), stdin=quiet, stdout=quiet, stderr=quiet, cwd=ROOT, env=environment()
    )


def records(workdir: Path, kind: str) -> list[dict]:
    """Records of one kind in metrics.jsonl so far; a line still being written is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def wait_for_step(
    process: subprocess.Popen, workdir: Path, step: int, timeout: float = 240
) -> None:
    """Return as soon as metrics.jsonl shows `step`."""
    end = time.monotonic() + timeout
    while not any(r["step"] >= step for r in records(workdir, "train")):
        assert process.poll() is None, f"ended with {process.returncode} before step {step}"
        assert time.monotonic() < end, f"no step {step} in {timeout} s"
        time.sleep(0.005)
