"""What an environment owns outside of Python's memory, so that it goes when the environment goes,
closed or forgotten."""

from __future__ import annotations

import contextlib
import subprocess

from rlm_runtime.repl.process import Process
from rlm_runtime.repl.spawn import SPAWNER
from rlm_runtime.repl.workdir import WorkDir


class Resources:
    """`command`: what ends the worker where killing our own child is not enough (a container)."""

    def __init__(self) -> None:
        self.folder: WorkDir | None = None
        self.process: Process | None = None
        self.command: list[str] | None = None
        self._spawner = False
        self._killers: list[subprocess.Popen[bytes]] = []

    def hold_spawner(self) -> None:
        if not self._spawner:
            SPAWNER.acquire()
            self._spawner = True

    def kill_outside(self) -> None:
        command, self.command = self.command, None
        if command is not None:
            quiet = subprocess.DEVNULL
            with contextlib.suppress(OSError):
                killer = subprocess.Popen(
                    command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
                )
                self._killers.append(killer)

    def take_killers(self) -> list[subprocess.Popen[bytes]]:
        taken, self._killers = self._killers, []
        return taken

    def drop(self) -> None:
        """Everything at once, without an event loop."""
        process, folder, spawner = self.process, self.folder, self._spawner
        self.process, self.folder, self._spawner = None, None, False
        if process is not None:
            with contextlib.suppress(Exception):
                self.kill_outside()
                process.kill()
                process.popen.wait(5)
                process.release()
        for killer in self.take_killers():
            with contextlib.suppress(Exception):
                killer.wait(5)
        if folder is not None:
            folder.remove()
        if spawner:
            SPAWNER.release()
