"""The soak of hosts: the process that has the run is killed, as by a machine that runs out of
memory. Its worker must end with it, what it recorded must be readable, and its work folder must be
swept away by the next host."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.record import ROOT
from benchmarks.rlm_run import descendants
from benchmarks.scripted_server import Served
from rlm_runtime.trajectory import read

DRIVER = Path(__file__).parent / "rlm_driver.py"
CELLS = (
    "r = llm_batch([f'piece {i}' for i in range(64)])",
    "import os\nfor i in range(50):\n    with open(f'f{i}', 'w') as f: f.write('x' * 1000)",
    "n = 0\nfor i in range(20_000_000):\n    n += i",
)
START = 30.0  # seconds a host may take to have a worker
GONE = 20.0  # seconds a worker may take to follow its host, on a machine that is busy


def soak_hosts(seed: str, count: int) -> tuple[int, list[str]]:
    """Kill `count` hosts, one after the other, at moments of the seed's choice: workers that were
    seen, and what is wrong."""
    seen, problems, names = 0, [], []
    replies = [f"```repl\n{cell}\n```" for cell in CELLS * 20]
    with (
        tempfile.TemporaryDirectory(prefix="soak-hosts-") as folder,
        Served(replies, latency=0.02) as server,
    ):
        context = Path(folder) / "context.txt"
        context.write_text("A text. " * 100, encoding="utf-8")

        def start(i: str, replies: int) -> subprocess.Popen[str]:
            job = {
                "root": str(ROOT),
                "url": server.url,
                "turns": replies,
                "log_dir": str(Path(folder) / f"log-{i}"),
                "context": {"kind": "text", "path": str(context)},
            }
            quiet = subprocess.DEVNULL
            return subprocess.Popen(
                [sys.executable, str(DRIVER), json.dumps(job)],
                stdout=quiet,
                stderr=quiet,
                text=True,
            )

        for i in range(count):
            host = start(str(i), 60)
            chance = random.Random(f"{seed}/host/{i}")
            # every third may die before it has a worker
            deadline = time.monotonic() + (0 if i % 3 == 2 else START)
            while not any(descendants(host.pid)) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1.0))
            with suppress(ProcessLookupError):
                host.send_signal(signal.SIGSTOP)
            left = {
                pid: began for pid in descendants(host.pid) if (began := _began(pid)) is not None
            }
            seen += len(left)
            host.kill()
            host.wait()
            names.append(f"-{host.pid}-")
            deadline = time.monotonic() + GONE
            while (
                any(_began(pid) == began for pid, began in left.items())
                and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            for pid, began in left.items():
                if _began(pid) == began:
                    problems.append(
                        f"host {i}: its worker {pid} is still there {GONE:.0f} s after its host was killed"
                    )
                    os.kill(pid, signal.SIGKILL)
            for run in (Path(folder) / f"log-{i}").glob("[!.]*"):
                try:
                    if [e.type for e in read(run)][:1] not in ([], ["run_start"]):
                        problems.append(f"host {i}: its trajectory has no beginning")
                except Exception as e:
                    problems.append(f"host {i}: its trajectory cannot be read: {e!r}")
        start("next", 1).wait()
    temp = Path(tempfile.gettempdir())
    left_over = [p.name for p in temp.glob("rlm-*") if any(name in p.name for name in names)]
    problems += [
        f"the work folder {name} of a killed host was not swept away by the next one"
        for name in left_over
    ]
    return seen, problems


def _began(pid: int) -> str | None:
    """When a process was started; None where it is gone, or dead and waiting for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
