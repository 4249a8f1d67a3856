"""An ordinary user for tests that run as root: an interpreter that user can read, and a command in
front of it."""

from __future__ import annotations

import functools
import glob
import os
import shutil
import subprocess
import sys
import sysconfig

from rlm.attacks.arena import REPOSITORY, ROOT

# The interpreter has to start itself once more, as it does for every worker.
IMPORTS = """
import subprocess, sys
import pydantic, rlm_runtime.repl.local, rlm.attacks.arena
subprocess.run([sys.executable, "-I", "-S", "-c", "import ctypes, asyncio"], check=True)
"""
USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]


def environment() -> dict[str, str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "tests"), sysconfig.get_path("purelib")]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": "/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/tmp",
    }


@functools.cache
def command() -> tuple[str, ...] | str:
    """Command that runs Python as an ordinary user, or why there is none."""
    if not ROOT:
        return (sys.executable,)
    if shutil.which("setpriv") is None:
        return "setpriv is not installed"
    name = f"python3.{sys.version_info.minor}"
    tried = dict.fromkeys(
        [
            sys.executable,
            f"/usr/bin/{name}",
            f"/usr/local/bin/{name}",
            *glob.glob(f"/opt/*/bin/{name}"),
        ]
    )
    said = ""
    for python in tried:
        run = subprocess.run(
            [*USER, python, "-c", IMPORTS],
            env=environment(),
            cwd="/",
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            return (*USER, python)
        said = f"{python}: {run.stderr.strip()[-200:]}"
    return (
        f"no Python {sys.version_info.minor} with pydantic that the user nobody can read ({said})"
    )
