"""Runs the processes of a job on this machine: start, output with process numbers, common end,
restart."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from mor_jax.parallel.multihost import LOST


def run_job(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], *, grace: float = 120.0
) -> int:
    """Run a command once for each environment (beside this process's own), to the end of all.

    Every line carries the number of its process. SIGINT and SIGTERM are passed on as SIGTERM, on
    which a training run saves and ends. When a process fails, the others get SIGTERM too and,
    `grace` seconds later, SIGKILL.

    Returns 0, or the status of the first process that failed; negative: the signal that killed it.
    """
    # Sessions of their own: a signal to this process is passed on once, not seen twice.
    jobs = [
        subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        for env in environments
    ]
    echoes = [
        threading.Thread(target=_echo, args=(rank, job), daemon=True)
        for rank, job in enumerate(jobs)
    ]
    for thread in echoes:
        thread.start()
    first, deadline = 0, None
    with _passed_on(jobs):
        while True:
            running = [job for job in jobs if job.poll() is None]
            failed = [job.returncode for job in jobs if job.returncode]
            if failed and not first:
                first, deadline = failed[0], time.monotonic() + grace
                _signal(running, signal.SIGTERM)
            if not running:
                break
            if deadline is not None and time.monotonic() > deadline:
                _signal(running, signal.SIGKILL)
            time.sleep(0.05)
    for thread in echoes:
        thread.join(timeout=5)
    return first


def lost_a_process(status: int) -> bool:
    """Whether a job that ended so goes on when it is started again: told by another process, or
    killed by a signal."""
    return status == LOST or status < 0


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _echo(rank: int, job: subprocess.Popen[str]) -> None:
    for line in job.stdout or ():
        print(f"[{rank}] {line}", end="", flush=True)


def _signal(jobs: Sequence[subprocess.Popen[str]], number: int) -> None:
    for job in jobs:
        if job.poll() is None:
            job.send_signal(number)


@contextlib.contextmanager
def _passed_on(jobs: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    def handler(_number: int, _frame: object) -> None:
        return _signal(jobs, signal.SIGTERM)

    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
        _signal(jobs, signal.SIGKILL)
