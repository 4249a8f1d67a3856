"""Run a command as a job of several processes on this machine.

    python -m launch.local --processes 2 -- launch.train --config configs/quickstart.py --workdir runs/two
    python -m launch.local --processes 2 --devices 4 --dry_run -- launch.train ...   # 2 x 4 simulated CPU devices
    python -m launch.local --processes 4 --gpus 2 -- launch.train ...                # GPUs 0,1 to the first, ...

Each line of output carries the number of its process. Ctrl-C and SIGTERM are passed on, so that the job saves and ends;
a process that fails ends the others. With --restarts, a job that lost a process is started again and goes on from its
last checkpoint. The exit status is that of the first process that failed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import flags

from launch import cli
from launch.jobs import local_environments, python_command, shell_line

_PROCESSES = flags.DEFINE_integer("processes", 1, "Processes of the job.", lower_bound=1)
_DEVICES = flags.DEFINE_integer("devices", 0, "Simulated CPU devices of each; 0: the hardware there is.", lower_bound=0)
_GPUS = flags.DEFINE_integer("gpus", 0, "GPUs of each process; 0: whatever it finds.", lower_bound=0)
_PORT = flags.DEFINE_integer("port", 0, "Port of the first process; 0: a free one.", lower_bound=0)
_RESTARTS = flags.DEFINE_integer("restarts", 0, "Times a job that lost a process is started again.", lower_bound=0)
_GRACE = flags.DEFINE_float("grace", 120.0, "Seconds the others have to end after one has failed.", lower_bound=0.0)
_DRY = flags.DEFINE_bool("dry_run", False, "Print the commands, run nothing.")

LOST = 75  # exit status of a process that ends because another one is gone: the same command goes on


def main(arguments: list[str]) -> None:
    command = python_command(arguments, sys.executable)
    for attempt in range(_RESTARTS.value + 1):
        port = _PORT.value or (8476 if _DRY.value else _free_port())
        envs = local_environments(_PROCESSES.value, port=port, devices=_DEVICES.value, gpus=_GPUS.value)
        if _DRY.value:
            print("\n".join(shell_line(command, env) for env in envs))
            return
        status = _run(command, envs)
        lost = status == LOST or status < 0  # told by another process, or killed by a signal
        if not lost or attempt == _RESTARTS.value:
            sys.exit(status if status >= 0 else 128 - status)
        print(f"[job] lost a process (status {status}); start {attempt + 2} of {_RESTARTS.value + 1}", flush=True)


def _run(command: list[str], envs: list[dict[str, str]]) -> int:
    """0, or the status of the first process that failed. The others then have `grace` seconds."""
    # Sessions of their own: a signal to this process is passed on once, not seen twice.
    jobs = [
        subprocess.Popen(
            command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            text=True, errors="replace", start_new_session=True,
        )
        for env in envs
    ]  # fmt: skip
    echoes = [threading.Thread(target=_echo, args=(rank, job), daemon=True) for rank, job in enumerate(jobs)]
    for thread in echoes:
        thread.start()
    with _passed_on(jobs):
        first, deadline = 0, None
        while any(job.poll() is None for job in jobs):
            failed = [job.returncode for job in jobs if job.returncode]
            if failed and deadline is None:
                first, deadline = failed[0], time.monotonic() + _GRACE.value
                _signal(jobs, signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                _signal(jobs, signal.SIGKILL)
            time.sleep(0.05)
    for thread in echoes:
        thread.join(timeout=5)
    return first or next((job.returncode for job in jobs if job.returncode), 0)


def _echo(rank: int, job: subprocess.Popen) -> None:
    for line in job.stdout:
        print(f"[{rank}] {line}", end="", flush=True)


def _signal(jobs: list[subprocess.Popen], number: int) -> None:
    for job in jobs:
        if job.poll() is None:
            job.send_signal(number)


@contextlib.contextmanager
def _passed_on(jobs: list[subprocess.Popen]):
    handler = lambda _number, _frame: _signal(jobs, signal.SIGTERM)
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
        _signal(jobs, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    cli.run(main, arguments=True)
