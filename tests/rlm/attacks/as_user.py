"""Run as a program: every probe and a choice of the other attacks, in the user it is started as.
Prints JSON."""

from __future__ import annotations

import json
import os
import tempfile

from rlm.attacks import (
    test_crashes,
    test_left_behind,
    test_loops,
    test_network,
    test_processes,
    test_protocol,
    test_resources,
    test_restart,
    test_secrets,
    test_text,
    test_visible,
)
from rlm.attacks.arena import SMALL, TIMED, X86, Arena

CHOSEN = {
    "bytes",
    "list of lists",
    "many files",
    "file without a name",
    "file without a name or descriptor",
    "reserved by number",
    "ten thousand",
    "fork bomb",
    "past the streams",
    "pass",
    "everything caught",
    "power of powers",
    "signals blocked",
    "null",
    "abort",
    "exit 0",
    "kill",
    "close everything",
    "garbage",
    "a gigabyte without an end",
    "nesting",
    "quoted backslashes",
    "markup",
    "alarm with a handler",
    "stopped",
    "the main thread ends",
}
GROUPS = (
    (
        {},
        test_secrets.PROBES
        + test_network.PROBES
        + test_processes.PROBES
        + test_text.TEXTS
        + test_visible.ALL,
    ),
    (
        SMALL,
        test_resources.MEMORY
        + test_resources.DISK
        + test_resources.THREADS
        + test_protocol.WASTE
        + test_left_behind.LEFT,
    ),
    ({"memory": 1 << 30}, test_restart.RESTARTS if X86 else []),
    (TIMED, test_loops.LOOPS + test_crashes.CRASHES + test_crashes.HARMLESS),
)


def main() -> None:
    failed, count = {}, 0
    # as `export LD_LIBRARY_PATH=/x:$LD_LIBRARY_PATH` makes it
    os.environ["LD_LIBRARY_PATH"] = "/no/such/folder:"
    for limits, attacks in GROUPS:
        with Arena(**limits) as arena:
            for what in attacks:
                if limits in (SMALL, TIMED) and what.name not in CHOSEN:
                    continue
                count += 1
                try:
                    arena.play(what)
                except AssertionError as problem:
                    failed[what.name] = str(problem)[:1000]
            line = arena.report.line()
    print(json.dumps({"user": os.geteuid(), "attacks": count, "failed": failed, "report": line}))


if __name__ == "__main__":
    tempfile.tempdir = tempfile.mkdtemp(prefix="rlm-as-user-")
    try:
        main()
    finally:
        os.rmdir(tempfile.tempdir)
