"""The local worker inside bubblewrap: its own mounts, processes and network around the locks it
puts on itself."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from rlm_runtime.errors import SandboxError
from rlm_runtime.repl import sandbox
from rlm_runtime.repl.host import HostedEnvironment
from rlm_runtime.repl.hosted import WORKER
from rlm_runtime.repl.local import python_argv
from rlm_runtime.repl.process import Launch, Process
from rlm_runtime.repl.workdir import WorkDir

# programs and libraries of the system; links stay links
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")
NAMESPACES = {"mnt": "mounts", "pid": "processes", "net": "network", "ipc": "IPC"}


class BubblewrapEnvironment(HostedEnvironment):
    """All layers of the local environment are required inside as well. Needs `bwrap` and user
    namespaces."""

    kind = "bubblewrap"
    required = ("namespaces", *sandbox.LAYERS)
    overlap = False  # what the worker may read is mounted when it starts

    def _launch(self, folder: WorkDir) -> Launch:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxError(
                "environment='bubblewrap' needs the program bwrap, which is not on PATH. Install it (apt-get install "
                "bubblewrap, or dnf install bubblewrap), or use environment='local', which needs no program."
            )
        front = [os.path.abspath(bwrap), *self.arguments(folder), "--"]
        python = python_argv(os.path.realpath(sys.executable))
        return Launch(
            lambda fd: [*front, *python, str(fd)], sandbox.environment(str(folder.scratch))
        )

    def arguments(self, folder: WorkDir) -> list[str]:
        """Options of bwrap: nothing but the system's libraries, Python, and this worker's own
        folders is there."""
        args = ["--unshare-all", "--die-with-parent", "--cap-drop", "ALL", "--hostname", "rlm"]
        for path in SYSTEM:
            if os.path.islink(path):
                args += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                args += ["--ro-bind", path, path]
        args += [
            "--ro-bind-try",
            "/etc/ld.so.cache",
            "/etc/ld.so.cache",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
        ]
        read = [
            sys.base_prefix,
            sys.base_exec_prefix,
            os.path.dirname(os.path.realpath(sys.executable)),
            str(WORKER),
        ]
        read += self._packages.paths
        read += [str(path) for payload in self._payloads.values() for path in payload.paths]
        read += [str(folder.inbox), str(folder.canary)]
        for path in dict.fromkeys(read):
            if not any(Path(path).is_relative_to(system) for system in SYSTEM):
                args += ["--ro-bind", path, path]
        for path in (str(folder.scratch), str(folder.said)):
            args += ["--bind", path, path]
        return [*args, "--chdir", "/"]

    def _outer_layers(self, process: Process) -> dict[str, str]:
        """Whether the worker really is in namespaces of its own."""
        shared = []
        for name, what in NAMESPACES.items():
            try:
                if os.readlink(f"/proc/{process.worker_pid}/ns/{name}") == os.readlink(
                    f"/proc/self/ns/{name}"
                ):
                    shared.append(what)
            except OSError:
                shared.append(f"{what} (cannot be seen)")
        if shared:
            return {"namespaces": f"missing: shared with the host: {', '.join(shared)}"}
        return {"namespaces": f"active ({', '.join(NAMESPACES.values())})"}

    def _explain(self, stderr: str) -> str:
        hint = ""
        if "namespace" in stderr or "uid map" in stderr or "Operation not permitted" in stderr:
            hint = (
                " This system does not let an ordinary user make namespaces (in a container, or by AppArmor on Ubuntu "
                "24.04: see kernel.apparmor_restrict_unprivileged_userns). environment='local' needs none."
            )
        return super()._explain(stderr) + hint
