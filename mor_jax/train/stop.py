"""Early stop: after a signal to any process of the job, all processes save after the same step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

from mor_jax.parallel.multihost import Hosts

# SIGTERM is the notice of Kubernetes, of cloud machines about to be taken back and of Slurm, which
# can also be told to send SIGUSR1 some time before the limit (sbatch --signal=USR1@120).
SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Stop:
    """Whether the run is to end early, and why (`name`, for the message)."""

    def __init__(self, hosts: Hosts):
        self.name = ""
        self._hosts, self._ticks = hosts, 0

    def after_this_step(self) -> bool:
        """Ask once a step; every process of the job gets the same answer at the same step."""
        if self._hosts.count == 1:
            return bool(self.name)
        self._ticks += 1  # of its own: steps go back when a run rewinds
        if not self._hosts.stop_at(self._ticks):
            return False
        self.name = self.name or "SIGTERM to one of the processes"
        return True


@contextlib.contextmanager
def stop_signals(hosts: Hosts) -> Iterator[Stop]:
    """SIGTERM, SIGUSR1 and SIGINT ask for a save and an early end; a second SIGINT interrupts at
    once."""
    stop, previous = Stop(hosts), {}

    def handler(number: int, _frame: Any) -> None:
        if stop.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name
        if hosts.count > 1:
            # to the preemption service, which tells the other processes
            os.kill(os.getpid(), signal.SIGTERM)

    # In a job of several, SIGTERM stays with JAX's preemption service.
    ours = [number for number in SIGNALS if hosts.count == 1 or number != signal.SIGTERM]
    # not the main thread (a notebook server, say): no handlers then
    with contextlib.suppress(ValueError):
        for number in ours:
            previous[number] = signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
