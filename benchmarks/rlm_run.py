"""One run of a case: model server, driver process, and a look at the memory of the driver and its
worker."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Samples
from benchmarks.rlm_cases import Case, Ran
from benchmarks.scripted_server import Served

SAMPLE = 0.02  # seconds between two looks at /proc
PATIENCE = 900.0  # seconds for one run


class Failed(Exception):
    """A run did not do what its script asks for; says what it said instead."""


@dataclass(frozen=True)
class Driver:
    """A runtime under measurement: which Python runs which script, and how its root has to
    write."""

    name: str
    python: str
    script: Path
    form: str


@dataclass
class CaseRun:
    """A case in one runtime, as `record.rounds` wants it. What goes wrong is kept, and the case not
    tried again."""

    case: Case
    driver: Driver
    contexts: dict[str, Path]
    elsewhere = True  # its CPU seconds are its own processes'
    samples: Samples = field(default_factory=Samples)
    figures: list[dict[str, float]] = field(default_factory=list)
    said: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None

    def once(self) -> tuple[float, float]:
        before, began = _children(), time.perf_counter()
        if self.failure is None:
            try:
                ran = run(self.case, self.driver, self.contexts)
                self.said = ran.said
                self.figures.append(self.case.read(ran))
            except Failed as e:
                self.failure = str(e)
        return time.perf_counter() - began, _children() - before


def run(case: Case, driver: Driver, contexts: dict[str, Path]) -> Ran:
    """Raises Failed."""
    replies = case.replies(driver.form)
    with (
        tempfile.TemporaryDirectory(prefix="rlm-overhead-") as folder,
        Served(replies, latency=case.latency) as server,
    ):
        job = {
            "root": str(ROOT),
            "url": server.url,
            "turns": len(replies),
            "log_dir": folder if case.log else None,
            "context": {
                "kind": "file" if case.file else "text",
                "path": str(contexts[case.context]),
            },
        }
        command = [driver.python, str(driver.script), json.dumps(job)]
        spawned = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_env(folder)
        )
        with Watch(process.pid) as watch:
            try:
                out, err = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
                err = f"no end after {PATIENCE:.0f} s\n{err}"
    said = _last_json(out)
    log = server.log
    problems = []
    if process.returncode or said is None:
        problems.append(f"status {process.returncode}: {err.strip()[-500:] or out.strip()[-500:]}")
    if len(log.get("root_times", ())) != len(replies):
        problems.append(f"{len(log.get('root_times', ()))} root calls instead of {len(replies)}")
    if log.get("sub_calls") != case.sub_calls:
        problems.append(f"{log.get('sub_calls')} sub-calls instead of {case.sub_calls}")
    if said is not None and said["answer"] in (None, ""):
        problems.append(f"no answer: {said}")
    if problems:
        raise Failed(f"{driver.name}, {case.name}: {'; '.join(problems)}")
    return Ran(
        spawned,
        said,
        log,
        watch.peak(process.pid),
        watch.peak_of_others(process.pid),
        watch.samples,
    )


def _last_json(text: str) -> dict[str, Any] | None:
    """The driver's line; libraries may print before it."""
    for line in reversed(text.strip().splitlines()):
        with suppress(ValueError):
            return json.loads(line)
    return None


def _env(folder: str) -> dict[str, str]:
    """No key and no endpoint of the user's; caches of the peers go away with the run. Bytecode is
    kept, as `pip install` does for the peers: a source tree would be compiled in every process."""
    left_out = ("OPENAI_", "ANTHROPIC_", "LITELLM_", "DSPY_", "PYTHONDONTWRITEBYTECODE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    return kept | {
        "DSPY_CACHEDIR": folder,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONWARNINGS": "ignore",
    }


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Watch:
    """Looks at a process and those it starts: the highest resident memory of each, and samples over
    time."""

    def __init__(self, pid: int):
        self.pid, self._peaks, self._stop = pid, {}, threading.Event()
        self._seen: Counter[int] = Counter()  # looks at each
        self.samples: list[tuple[float, int, int, int, int]] = []
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def peak(self, pid: int) -> int:
        return self._peaks.get(pid, 0)

    def peak_of_others(self, pid: int) -> int:
        """Of the largest process that it started and that was there for more than a moment (as
        `uname` is not)."""
        return max(
            (peak for other, peak in self._peaks.items() if other != pid and self._seen[other] > 2),
            default=0,
        )

    def _watch(self) -> None:
        looks = 0
        while not self._stop.wait(SAMPLE):
            looks += 1
            host = _memory(self.pid)
            if host is None:
                continue
            self._peaks[self.pid] = max(host[1], self._peaks.get(self.pid, 0))
            command, worker = _command(self.pid), (0, 0)
            for pid in descendants(self.pid):
                found = _memory(pid)
                # Between fork and exec a child still is its parent.
                if found is not None and _command(pid) != command:
                    self._peaks[pid] = max(found[1], self._peaks.get(pid, 0))
                    self._seen[pid] += 1
                    worker = max(worker, (found[0], _descriptors(pid)))
            if looks % 5 == 0 or looks < 5:
                self.samples.append((time.monotonic(), host[0], _descriptors(self.pid), *worker))


def descendants(pid: int) -> Iterator[int]:
    """Every process below `pid`."""
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                    yield int(child)
                    yield from descendants(int(child))


def _memory(pid: int) -> tuple[int, int] | None:
    """Resident bytes now, and the most so far."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    sizes = {
        name: 1024 * int(rest.split()[0])
        for name, _, rest in (x.partition(":") for x in lines)
        if name[:2] == "Vm"
    }
    return (sizes["VmRSS"], sizes["VmHWM"]) if "VmHWM" in sizes else None


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _descriptors(pid: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0
