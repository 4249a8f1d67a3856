"""The local REPL: a CPython process of this host that has locked itself in. No container, no
privilege."""

from __future__ import annotations

import os
import sys

from rlm_runtime.repl import sandbox
from rlm_runtime.repl.host import HostedEnvironment
from rlm_runtime.repl.hosted import WORKER
from rlm_runtime.repl.process import Launch
from rlm_runtime.repl.workdir import WorkDir


def python_argv(executable: str | None = None) -> list[str]:
    """Python without site packages, user settings and PYTHON* variables."""
    return [
        executable or os.path.abspath(sys.executable),
        "-I",
        "-S",
        "-X",
        "utf8",
        str(WORKER / "main.py"),
    ]


class LocalEnvironment(HostedEnvironment):
    """See `repl.base.Environment`; all layers of `repl.sandbox.LAYERS` are required unless the
    policy says otherwise."""

    kind = "local"
    wrapper: tuple[str, ...] = ()  # a command in front of the worker's own

    def _launch(self, folder: WorkDir) -> Launch:
        self.parent = os.getpid() if not self.wrapper else None
        env = sandbox.environment(str(folder.scratch))
        return Launch(lambda fd: [*self.wrapper, *python_argv(), str(fd)], env)


class UnconfinedEnvironment(LocalEnvironment):
    """The same process without a sandbox: its code can read, write and send whatever this user can.
    Only for code you would run yourself, on systems that have no sandbox to offer."""

    kind = "unconfined"
    confine = False
    required = ("environment", "descriptors", "limits")
