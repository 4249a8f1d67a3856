"""Which layers a worker must have, what it says when one is missing, and how to do without on
purpose."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from rlm_runtime.errors import SandboxError, UsageError
from rlm_runtime.lms.base import Frozen
from rlm_runtime.repl.base import SandboxReport

LAYERS = {
    "environment": "variables of the host are kept from the worker",
    "descriptors": "open files of the host are kept from the worker",
    "limits": "memory, file size and descriptors are bounded by the kernel",
    "privileges": "no_new_privs is set and no capability is left",
    "landlock": "files are an allow-list (Linux 5.13 or newer with landlock among its security modules)",
    "seccomp": "system calls are an allow-list: no sockets, no processes (x86-64 and aarch64 Linux)",
}
OUTER = {
    "namespaces": "mounts, processes and network are the worker's own (user namespaces)",
    "container": "the worker runs in a container without network",
}
# required of a worker whose container does the rest
CONTAINED = ("environment", "descriptors", "limits")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "OPENSSL_CONF": "/dev/null",
    "MALLOC_ARENA_MAX": "2",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
PASSED_ON = ("LD_LIBRARY_PATH",)  # where this Python's own shared libraries may lie


class SandboxPolicy(Frozen):
    """How a worker is confined. Everything is on by default; what is missing is an error unless it
    is named here."""

    # layers this host may lack, by name: "landlock", "seccomp", ...
    allow_missing: tuple[str, ...] = ()
    threads: int = 512  # of one worker
    files: int = 10_000  # in the work folder
    descriptors: int = 256  # open at once

    def model_post_init(self, _context: object) -> None:
        known = LAYERS | OUTER
        unknown = [name for name in self.allow_missing if name not in known]
        if unknown:
            raise UsageError(
                f"SandboxPolicy: there is no layer {unknown[0]!r}. Layers: {', '.join(known)}."
            )


def environment(scratch: str) -> dict[str, str]:
    """All the environment variables a worker gets."""
    passed = {
        name: folders for name in PASSED_ON if (folders := fixed_folders(os.environ.get(name, "")))
    }
    return ENVIRONMENT | passed | {"HOME": scratch, "TMPDIR": scratch}


def fixed_folders(value: str) -> str:
    """A search path without the entries that mean another folder to another process.

    The loader reads an empty or relative entry as the current folder, and `;` as a separator too.
    Links are followed here, since /proc/self/cwd is absolute as well.
    """
    entries = [
        entry for entry in re.split("[:;]", value) if os.path.isabs(entry) and os.path.isdir(entry)
    ]
    return ":".join(dict.fromkeys(os.path.realpath(entry) for entry in entries))


def report(
    kind: str,
    layers: Mapping[str, str],
    policy: SandboxPolicy,
    required: tuple[str, ...],
    before: SandboxReport | None = None,
) -> SandboxReport:
    """The report of a worker; `before`: of the one in whose place it was started. Raises
    SandboxError for a required layer that is not active."""
    missing = tuple(
        name
        for name in required
        if not layers.get(name, "missing").startswith(("active", "scrubbed"))
    )
    refused = [name for name in missing if name not in policy.allow_missing]
    if refused:
        about = LAYERS | OUTER
        why = "\n".join(
            f"  {name} ({about[name]}): {layers.get(name, 'missing: not reported')}"
            for name in refused
        )
        # cells have run: what they did, or a full disk, is no reason to go without a sandbox
        if before is not None:
            raise SandboxError(
                f"A worker of the REPL was started anew and could not be locked in as the one before it:\n{why}\n"
                "No code was run in it. These layers were active when the run began, so this system has them: start "
                "the run again."
            )
        names = ", ".join(repr(name) for name in (*policy.allow_missing, *refused))
        raise SandboxError(
            f"The sandbox of the REPL is not complete, so no code was run:\n{why}\n"
            "Use a system that has it, or environment='docker' or 'bubblewrap'. To run without it on purpose: "
            f"SandboxPolicy(allow_missing=({names},)), or environment='unconfined' to run without any."
        )
    return SandboxReport(environment=kind, layers=dict(layers), missing=missing)


def seen_from_outside(pid: int, layers: dict[str, str]) -> dict[str, str]:
    """The worker's report corrected by what the kernel says of the process."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    except OSError:
        return layers
    wrong = {}
    if status.get("Seccomp", "2").strip() != "2" and layers.get("seccomp", "").startswith("active"):
        wrong["seccomp"] = "missing: the kernel knows of no filter"
    held = [
        name for name in ("CapEff", "CapPrm", "CapInh", "CapAmb") if int(status.get(name, "0"), 16)
    ]
    if layers.get("privileges", "").startswith("active") and (
        held or status.get("NoNewPrivs", "1").strip() != "1"
    ):
        wrong["privileges"] = (
            f"missing: the kernel still shows {', '.join(held) or 'new privileges allowed'}"
        )
    return layers | wrong
