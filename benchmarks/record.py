"""What every benchmark shares: timing that alternates, and a record that says where its numbers
come from."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mor_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SETTLE = 0.3  # seconds of silence before a timed step: thread pools of the one before stop spinning


@dataclass
class Samples:
    """Timed repetitions of one thing, in order."""

    wall: list[float] = field(default_factory=list)  # seconds
    cpu: list[float] = field(default_factory=list)  # CPU seconds of its process, all threads

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "seconds": self.median,
            "cpu_seconds": self.median_cpu,
            "rounds_seconds": self.wall,
            "rounds_cpu_seconds": self.cpu,
        }


class Timed(Protocol):
    """Something that can be run once and timed."""

    samples: Samples

    def once(self) -> tuple[float, float]:
        """Run; (wall seconds, CPU seconds)."""


def clock(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds of `work` in this process; `work` returns only when its result exists."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def rounds(runs: Sequence[Timed], repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run everything once a round, there and back again, so that what disturbs the machine disturbs
    all alike.

    Returns how busy the machine was: load average before and after, and the share of its cores that
    other processes used in between (None where the operating system does not say).
    """
    before, own = _busy(), time.process_time()
    load = _load()
    for i in range(repeats):
        tell(f"round {i + 1} of {repeats}")
        for run in runs if i % 2 == 0 else reversed(runs):
            time.sleep(SETTLE)
            wall, cpu = run.once()
            run.samples.wall.append(wall)
            run.samples.cpu.append(cpu)
    after = _busy()
    own = (
        time.process_time()
        - own
        + sum(sum(r.samples.cpu) for r in runs if getattr(r, "elsewhere", False))
    )
    others = None
    if before and after and after[1] > before[1]:
        others = max(0.0, (after[0] - before[0] - own) / (after[1] - before[1]))
    return {"load_before": load, "load_after": _load(), "others_share_of_cores": others}


def _load() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _busy() -> tuple[float, float] | None:
    """(busy, all) core seconds of the machine since it started."""
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    unit = os.sysconf("SC_CLK_TCK")
    # 3: idle, 4: waiting for disks
    return (sum(ticks) - ticks[3] - ticks[4]) / unit, sum(ticks) / unit


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name, family and model of the CPU and its widest vectors: libraries choose their kernels by
    them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    wide = [
        name for name in ("amx_tile", "avx512f", "avx2") if name in facts.get("flags", "").split()
    ]
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return ", ".join(
        [facts.get("model name", platform.processor() or "unknown"), family, *wide[:1]]
    )


def commit() -> str:
    """Commit of the checkout, "+changes" when files differ from it, "unknown" outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # A result of a benchmark is no change of what was measured.
        status = [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def slug(text: str) -> str:
    """A file name's worth of `text`: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def claim(path: Path) -> None:
    """Find out now, not after the measurement, that `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text("")
        path.with_suffix(".tmp").unlink()
    except OSError as e:
        raise UserError(f"--out {path} cannot be written: {e.strerror or e}.") from e


def write(path: Path, record: dict[str, Any]) -> None:
    """Write `record`, whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
