"""A thousand runs on bad days: crashes, kills, timeouts, failures and cancels, several runs at
once.

    python -m benchmarks.rlm_soak                      # 1,000 runs
    python -m benchmarks.rlm_soak --runs 100 --seed 7
    # one run again, by the seed that a violation was reported with
    python -m benchmarks.rlm_soak --only 0/123

Afterwards there must be no process, descriptor, thread or temporary file that was not there before,
and every run must have ended with a result or an error of `rlm_runtime`, and a trajectory that can
be read from its start to its end. Last, some host processes are killed in the middle of their runs:
their workers must end with them, the next host tidies up. Exit status 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import platform
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.rlm_run import descendants
from benchmarks.rlm_soak_hosts import soak_hosts
from benchmarks.rlm_soak_plan import plan
from benchmarks.rlm_soak_run import Report, World, soak_one
from benchmarks.scripted_server import Served
from mor_jax.errors import UserError
from rlm_runtime.lms.openai import OpenAILM

JOBS = 6


@dataclass(frozen=True)
class State:
    """What a process has that it could leak."""

    processes: tuple[str, ...]
    descriptors: tuple[str, ...]
    threads: tuple[str, ...]
    # in the folder for temporary files, by the names that this process gives
    files: tuple[str, ...]
    rss: int

    @classmethod
    def now(cls) -> State:
        gc.collect()
        me, temp = os.getpid(), tempfile.gettempdir()
        links = []
        for number in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue  # the descriptor of the listing itself
        with open("/proc/self/statm", encoding="ascii") as file:
            rss = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(
            processes=tuple(f"{pid} {_command(pid)}" for pid in descendants(me)),
            descriptors=tuple(sorted(links)),
            threads=tuple(sorted(t.name for t in threading.enumerate())),
            files=tuple(
                sorted(n for n in os.listdir(temp) if n.startswith("rlm-") and f"-{me}-" in n)
            ),
            rss=rss,
        )

    def more_than(self, before: State) -> dict[str, list[str]]:
        """What is here and was not `before`."""
        kinds = ("processes", "descriptors", "threads", "files")
        return {
            k: sorted((Counter(getattr(self, k)) - Counter(getattr(before, k))).elements())
            for k in kinds
        }

    def counts(self) -> dict[str, int]:
        kinds = ("processes", "descriptors", "threads", "files")
        return {k: len(getattr(self, k)) for k in kinds} | {"rss": self.rss}


def _command(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline")
            .read_bytes()
            .replace(b"\0", b" ")
            .decode(errors="replace")
            .strip()
        )
    except OSError:
        return "(gone)"


class Complaints(logging.Handler):
    """What asyncio says about tasks and errors that everybody has forgotten: work that was not
    waited for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []
        self.running: set[str] = set()  # seeds

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(
            f"{record.getMessage()} (runs at the time: {', '.join(sorted(self.running))})"
        )

    def __enter__(self) -> Complaints:
        logging.getLogger("asyncio").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        gc.collect()
        logging.getLogger("asyncio").removeHandler(self)


def soak(
    seeds: Sequence[str],
    *,
    jobs: int = JOBS,
    seconds: float = 1800.0,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run every seed's plan, `jobs` at once; begin none after `seconds`. JSON-ready: counts, leaks,
    violations."""
    with (
        Served([""], sub="sub says so") as server,
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
    ):
        warm = [f"{seed}/warm" for seed in seeds[:2]]  # what is made once in a process is no leak
        asyncio.run(_all(warm, server.url, Path(folder), jobs, seconds, lambda _: None, set()))
        before, began = State.now(), time.monotonic()
        with Complaints() as complaints:
            reports = asyncio.run(
                _all(seeds, server.url, Path(folder), jobs, seconds, tell, complaints.running)
            )
        took, after = time.monotonic() - began, _settled(before)
    leaked = after.more_than(before)
    violations = [
        {"seed": r.plan.seed, "problems": r.problems, "plan": str(r.plan)}
        for r in reports
        if r.problems
    ]
    return {
        "runs": len(reports),
        "not_begun": len(seeds) - len(reports),
        "jobs": jobs,
        "seconds": took,
        "slowest_run_seconds": max((r.seconds for r in reports), default=0.0),
        "workers_started": sum(r.workers for r in reports),
        "outcomes": dict(Counter(r.outcome for r in reports).most_common()),
        "faults": dict(sorted(Counter(f for r in reports for f in r.plan.faults()).items())),
        "ways": dict(Counter(r.plan.way for r in reports).most_common()),
        "before": before.counts(),
        "after": after.counts(),
        "leaked": leaked,
        "violations": violations,
        "complaints": complaints.heard,
        "passed": not (violations or complaints.heard or any(leaked.values()))
        and len(reports) == len(seeds),
    }


def _settled(before: State) -> State:
    """The state once what was told to end has ended: threads that were joined by nobody get a
    moment."""
    deadline = time.monotonic() + 10
    while any((state := State.now()).more_than(before).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return state


async def _all(
    seeds: Sequence[str],
    url: str,
    folder: Path,
    jobs: int,
    seconds: float,
    tell: Callable[[str], None],
    running: set[str],
) -> list[Report]:
    deadline = time.monotonic() + seconds
    http = OpenAILM("sub", base_url=url, api_key="k", max_retries=1, backoff=0.01)
    todo, reports = iter(seeds), []
    with ThreadPoolExecutor(jobs, thread_name_prefix="soak") as threads:
        world = World(folder, http, threads)

        async def worker() -> None:
            for seed in todo:
                if time.monotonic() > deadline:
                    return
                running.add(seed)
                report = await soak_one(plan(seed), world)
                running.discard(seed)
                reports.append(report)
                for problem in report.problems:
                    tell(f"--only {seed}: {problem}")
                if len(reports) % 100 == 0:
                    tell(f"{len(reports)} of {len(seeds)} runs")

        async with asyncio.TaskGroup() as group:
            for _ in range(jobs):
                group.create_task(worker())
    await http.aclose()
    return reports


# -------------------------------------------------------------------- what a person reads


def show(result: dict[str, Any], console: Console) -> None:
    """What was done to the runs, how they ended, what is left of them."""
    left = Table(title="Before and after", box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(("", "before", "after", "leaked")):
        left.add_column(name, justify="right" if i else "left")
    for kind, leaked in result["leaked"].items():
        left.add_row(
            kind, str(result["before"][kind]), str(result["after"][kind]), str(len(leaked))
        )
    left.add_row(
        "RSS, MB", *(f"{result[when]['rss'] / 1e6:.0f}" for when in ("before", "after")), ""
    )
    for title, key in (("Injected", "faults"), ("How the runs ended", "outcomes")):
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_header=False)
        for name, count in result[key].items():
            table.add_row(name, str(count))
        console.print(table)
    console.print(left)
    for kind, leaked in result["leaked"].items():
        for name in leaked[:10]:
            console.print(f"leaked, {kind}: {name}", markup=False)
    for violation in result["violations"]:
        console.print(
            f"--only {violation['seed']}: {'; '.join(violation['problems'])}", markup=False
        )
        console.print(f"    {violation['plan']}", markup=False, highlight=False)
    for line in (*result["complaints"], *result.get("host_problems", ())):
        console.print(line, markup=False)
    if result.get("hosts_killed"):
        console.print(
            f"{result['hosts_killed']} hosts killed with {result['workers_of_killed_hosts']} workers: "
            f"{len(result['host_problems'])} problems"
        )
    if result["not_begun"]:
        console.print(f"{result['not_begun']} runs were not begun: the time was up.")
    verdict = (
        "[green]nothing leaked, every run ended well[/]"
        if result["passed"]
        else "[red]it does not hold[/]"
    )
    console.print(
        f"{result['runs']} runs, {result['workers_started']} workers, {result['seconds']:.0f} s, "
        f"slowest run {result['slowest_run_seconds']:.1f} s: {verdict}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rlm_soak",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=JOBS, help="runs at once")
    parser.add_argument(
        "--hosts",
        type=int,
        default=20,
        help="processes that are killed with their runs (default 20)",
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="begin no run after this time")
    parser.add_argument("--only", help="one run, by its seed: SEED/NUMBER")
    parser.add_argument(
        "--out", type=Path, default=record.ROOT / "benchmarks" / "results" / "rlm_soak.json"
    )
    args = parser.parse_args(argv)
    if min(args.runs, args.jobs, args.hosts + 1) < 1:
        parser.error("--runs and --jobs: expected at least 1; --hosts: at least 0.")
    console, status = Console(), Console(stderr=True)
    seeds = [args.only] if args.only else [f"{args.seed}/{i}" for i in range(args.runs)]
    if not args.only:
        try:
            record.claim(args.out)
        except UserError as e:
            status.print(f"error: {e}", markup=False)
            return 2
    result = soak(
        seeds,
        jobs=args.jobs,
        seconds=60 * args.minutes,
        tell=lambda line: status.print(line, markup=False),
    )
    if args.hosts and not args.only:
        seen, problems = soak_hosts(str(args.seed), args.hosts)
        result |= {
            "hosts_killed": args.hosts,
            "workers_of_killed_hosts": seen,
            "host_problems": problems,
        }
        result["passed"] = result["passed"] and not problems
    show(result, console)
    if args.only:
        console.print(str(plan(args.only)), markup=False)
    else:
        versions = {"python": platform.python_version(), "kernel": platform.release()}
        facts = {
            "benchmark": "rlm_soak",
            "time": record.now(),
            "commit": record.commit(),
            "versions": versions,
        }
        record.write(args.out, {**facts, "cores": record.cores(), "seed": args.seed, **result})
        console.print(f"Written: {args.out}", markup=False)
    return int(not result["passed"])


if __name__ == "__main__":
    sys.exit(main())
