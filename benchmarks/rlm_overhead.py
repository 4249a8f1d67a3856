"""What `rlm_runtime` adds to the models' own time: start, turns, contexts, sub-calls, output.

    python -m benchmarks.rlm_overhead  # with the peers, where this Python has them
    # where another Python has them: pip install rlms dspy
    python -m benchmarks.rlm_overhead --peers PYTHON
    python -m benchmarks.rlm_overhead --peers off --cases turns_many,text --repeats 3
    python -m benchmarks.rlm_overhead --quick --out /tmp/quick.json     # does it run

A scripted model on the loopback interface answers at once, so what is timed is the runtime (and,
alike for all, the HTTP client and this server). Every run is a process of its own. The runtimes
take turns, medians of the rounds are reported. The peers are `rlms` (the official implementation;
its default, in-process REPL) and `dspy.RLM` with its LocalInterpreter (a subprocess); neither
isolates the code it runs, `rlm_runtime` does, with every layer it has.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.rlm_cases import MB, QUICK, Case, Sizes, cases, write_contexts
from benchmarks.rlm_run import CaseRun, Driver
from mor_jax.errors import UserError

HERE = Path(__file__).parent
OURS = "rlm_runtime"
PEERS = {"rlms": ("rlm_rlms.py", "fenced"), "dspy": ("rlm_dspy.py", "dspy")}
INSTALL = (
    "No peers: pip install rlms dspy, or name a Python that has them with --peers /path/to/python."
)

Figures = dict[str, dict[str, float]]  # of one runtime: case -> figure -> median


@dataclass(frozen=True)
class Target:
    """A bound on a figure, in its own unit. `of`: the figure, from the medians of all cases and the
    sizes."""

    what: str
    needs: tuple[str, ...]
    of: Callable[[Figures, Sizes], float]
    at_most: float
    show: Callable[[float], str]


def _ms(value: float) -> str:
    return f"{1000 * value:.1f} ms"


def _s(value: float) -> str:
    return f"{value:.3f} s"


def _mb(value: float) -> str:
    return f"{value / MB:.0f} MB"


def _mb2(value: float) -> str:
    return f"{value / MB:.2f} MB"


def _times(value: float) -> str:
    return f"{value:.2f} x"


def _n(value: float) -> str:
    return f"{value:.0f}"


TARGETS = [
    Target(
        "a turn, at many turns",
        ("turns_many",),
        lambda f, s: f["turns_many"]["per_turn"],
        0.005,
        _ms,
    ),
    Target(
        "first root call of a new process, sandbox on",
        ("first_call",),
        lambda f, s: f["first_call"]["to_first_call"],
        0.4,
        _s,
    ),
    Target(
        "  over that of rlms in the same rounds",
        ("first_call", "rlms:first_call"),
        lambda f, s: f["first_call"]["to_first_call"] / f["rlms:first_call"]["to_first_call"],
        0.5,
        _times,
    ),
    Target(
        "a text of 40 MB: call to first root call",
        ("text",),
        lambda f, s: f["text"]["load"],
        0.5,
        _s,
    ),
    Target(
        "  what it adds to a turn",
        ("text", "turns_few"),
        lambda f, s: f["text"]["per_turn"] - f["turns_few"]["median_turn"],
        0.002,
        _ms,
    ),
    Target(
        "  worker's RSS over the text's size",
        ("text",),
        lambda f, s: f["text"]["worker_rss"] / s.text,
        2.0,
        _times,
    ),
    Target(
        "  host and worker over a short run's, the caller's own text apart, over the text's size",
        ("text", "turns_few"),
        lambda f, s: (_rss(f["text"]) - _rss(f["turns_few"]) - s.text) / s.text,
        2.0,
        _times,
    ),
    Target(
        "a file of 40 MB: call to first root call",
        ("text_file",),
        lambda f, s: f["text_file"]["load"],
        0.5,
        _s,
    ),
    Target(
        "  host and worker over a short run's, over the file's size",
        ("text_file", "turns_few"),
        lambda f, s: (_rss(f["text_file"]) - _rss(f["turns_few"])) / s.text,
        2.0,
        _times,
    ),
    Target(
        "a file of 1 GB: call to first root call",
        ("big_file",),
        lambda f, s: f["big_file"]["open"],
        1.0,
        _s,
    ),
    Target(
        "  host's and worker's RSS together",
        ("big_file",),
        lambda f, s: f["big_file"]["host_rss"] + f["big_file"]["worker_rss"],
        200 * MB,
        _mb,
    ),
    Target("100 sub-calls of 50 ms", ("batch",), lambda f, s: f["batch"]["took"], 0.25, _s),
    Target(
        "print of 100 MB: the turn",
        ("print_large",),
        lambda f, s: f["print_large"]["turn"],
        0.5,
        _s,
    ),
    Target(
        "  host's and worker's RSS over that of a short run",
        ("print_large", "turns_few"),
        lambda f, s: _rss(f["print_large"]) - _rss(f["turns_few"]),
        40 * MB,
        _mb,
    ),
    Target(
        "100,000 sub-calls: growth of host and worker from 20,000 on",
        ("flood",),
        lambda f, s: f["flood"]["host_growth"] + f["flood"]["worker_growth"],
        20 * MB,
        _mb,
    ),
    Target(
        "  growth of their descriptors",
        ("flood",),
        lambda f, s: f["flood"]["host_descriptors"] + f["flood"]["worker_descriptors"],
        8,
        _n,
    ),
]

# Rows of the comparison: case, figure, how it is shown.
ROWS: list[tuple[str, str, str, Callable[[float], str]]] = [
    ("first_call", "to_first_call", "start of the process to first root call", _s),
    ("first_call", "import", "  of which imports and construction", _s),
    ("turns_few", "per_turn", "a turn, {few} turns", _ms),
    ("turns_many", "per_turn", "a turn, {many} turns", _ms),
    ("turns_many", "median_turn", "  median of the turns", _ms),
    ("turns_many", "sent", "  bytes sent to the root", _mb2),
    ("turns_many", "host_rss", "  peak RSS of the host", _mb),
    ("turns_many", "worker_rss", "  peak RSS of the worker", _mb),
    ("text", "load", "{text} text: call to first root call", _s),
    ("text", "per_turn", "  a turn", _ms),
    ("text", "run", "  the whole run", _s),
    ("text", "host_rss", "  peak RSS of the host", _mb),
    ("text", "worker_rss", "  peak RSS of the worker", _mb),
    ("text_file", "load", "{text} file: call to first root call", _s),
    ("text_file", "per_turn", "  a turn", _ms),
    ("text_file", "host_rss", "  peak RSS of the host", _mb),
    ("text_file", "worker_rss", "  peak RSS of the worker", _mb),
    ("big_file", "open", "{file} file: call to first root call", _s),
    ("big_file", "find", "  find a word at 90 % of it (a turn)", _s),
    ("big_file", "host_rss", "  peak RSS of the host", _mb),
    ("big_file", "worker_rss", "  peak RSS of the worker", _mb),
    ("batch", "took", "{batch} sub-calls of 50 ms at once", _s),
    ("batch", "at_once", "  at once at most", _n),
    ("batch_of_10", "took", "10 sub-calls of 50 ms at once", _s),
    ("one_by_one", "took", "{batch} sub-calls of 0 ms one by one", _s),
    ("many", "took", "{many_calls} sub-calls of 0 ms at once", _s),
    ("long_prompt", "took", "a sub-call with a prompt of {prompt}", _s),
    ("print", "turn", "print of {print}: the turn", _s),
    ("print", "host_rss", "  peak RSS of the host", _mb),
    ("print", "worker_rss", "  peak RSS of the worker", _mb),
    ("print_large", "turn", "print of {print_large}: the turn", _s),
    ("print_large", "host_rss", "  peak RSS of the host", _mb),
    ("print_large", "worker_rss", "  peak RSS of the worker", _mb),
    ("flood", "per_call", "{tiny} sub-calls in ten cells: a call", _ms),
    ("flood", "host_rss", "  peak RSS of the host", _mb),
    ("flood", "worker_rss", "  peak RSS of the worker", _mb),
]


def _rss(figures: dict[str, float]) -> float:
    return figures["host_rss"] + figures["worker_rss"]


# -------------------------------------------------------------------- measuring


def drivers(choice: str) -> list[Driver]:
    """Ours, and the peers that can be run. Raises UserError."""
    found = [Driver(OURS, sys.executable, HERE / "rlm_driver.py", "fenced")]
    if choice == "off":
        return found
    python = sys.executable if choice == "auto" else shutil.which(choice)
    if not python:
        raise UserError(f"--peers {choice!r} is neither auto nor off nor a Python that can be run.")
    have = peer_versions(python)
    if choice != "auto" and not have:
        raise UserError(
            f"--peers {choice}: that Python has neither rlms nor dspy; pip install rlms dspy."
        )
    for name, (script, form) in PEERS.items():
        if name in have:
            found.append(Driver(name, python, HERE / "peers" / script, form))
    return found


def peer_versions(python: str) -> dict[str, str]:
    """Those of the peers that `python` has."""
    code = (
        "import json, sys\nfrom importlib import metadata\nfound = {}\nfor name in sys.argv[1:]:\n"
        "    try:\n        found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n        pass\nprint(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", code, *PEERS], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def measure(
    wanted: list[Case], found: list[Driver], sizes: Sizes, repeats: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run everything; JSON-ready."""
    with tempfile.TemporaryDirectory(prefix="rlm-overhead-contexts-") as folder:
        contexts = write_contexts(Path(folder), sizes, {case.context for case in wanted})
        runs = [
            CaseRun(case, driver, contexts)
            for case in wanted
            for driver in found
            if case.peers or driver.name == OURS
        ]
        often, once = [r for r in runs if not r.case.once], [r for r in runs if r.case.once]
        busy = {}
        if often:
            busy["rounds"] = record.rounds(often, repeats, tell)
        if once:
            tell("what is run once")
            busy["once"] = record.rounds(once, 1, tell)
    results: dict[str, dict[str, Any]] = {driver.name: {} for driver in found}
    for run in runs:
        results[run.driver.name][run.case.name] = _result(run)
    python = next((d.python for d in found if d.name != OURS), None)
    names = ("aiohttp", "pydantic")
    return {
        "benchmark": "rlm_overhead",
        "time": record.now(),
        "commit": record.commit(),
        "device": _device(),
        "cores": record.cores(),
        "versions": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            **{n: metadata.version(n) for n in names},
            **(peer_versions(python) if python else {}),
        },
        "sandbox": next((r.said["sandbox"] for r in runs if r.said.get("sandbox")), {}),
        "busy": busy,
        "repeats": repeats,
        "sizes": sizes.__dict__,
        "cases": {case.name: case.what for case in wanted},
        "runtimes": results,
        "targets": verdicts(_with_peers(results), sizes),
    }


def _result(run: CaseRun) -> dict[str, Any]:
    if run.failure is not None:
        return {"failed": run.failure}
    names = run.figures[0]
    rounds = {name: [figures[name] for figures in run.figures] for name in names}
    return {
        "median": {n: statistics.median(v) for n, v in rounds.items()},
        "rounds": rounds,
        "cpu_seconds": run.samples.median_cpu,
    }


def medians(results: dict[str, Any]) -> Figures:
    return {name: result["median"] for name, result in results.items() if "median" in result}


def _with_peers(results: dict[str, dict[str, Any]]) -> Figures:
    """Our medians by case, and those of the peers by "peer:case"."""
    peers = {
        f"{n}:{case}": m for n, r in results.items() if n != OURS for case, m in medians(r).items()
    }
    return medians(results[OURS]) | peers


def verdicts(figures: Figures, sizes: Sizes) -> list[dict[str, Any]]:
    """Each target whose cases were measured: figure, bound, reached or not."""
    found = []
    for target in TARGETS:
        if all(name in figures for name in target.needs):
            value = target.of(figures, sizes)
            found.append(
                {
                    "what": target.what,
                    "value": value,
                    "at_most": target.at_most,
                    "reached": value <= target.at_most,
                }
            )
    return found


def _device() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    ):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -------------------------------------------------------------------- what a person reads


def show(result: dict[str, Any], sizes: Sizes, console: Console) -> None:
    """The targets, then everything beside the peers."""
    full = sizes == Sizes()
    if full:
        console.print(_targets_table(result))
    console.print(_comparison(result, sizes))
    for name, found in result["runtimes"].items():
        for case, r in found.items():
            if "failed" in r:
                console.print(f"{name} did not do {case}: {r['failed']}", markup=False)
    shares = [b["others_share_of_cores"] for b in result["busy"].values()]
    share = max((s for s in shares if s is not None), default=0.0)
    if share > 0.1:
        console.print(
            f"[yellow]Other processes used {share:.0%} of the cores meanwhile: measure again when quiet.[/]"
        )


def _targets_table(result: dict[str, Any]) -> Table:
    title = f"Targets: {result['device']}, {result['cores']} cores, median of {result['repeats']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(("figure", "measured", "at most", "")):
        table.add_column(name, justify="right" if i in (1, 2) else "left", no_wrap=True)
    shows = {target.what: target.show for target in TARGETS}
    for v in result["targets"]:
        verdict = "[green]reached[/]" if v["reached"] else "[red]not reached[/]"
        table.add_row(
            v["what"], shows[v["what"]](v["value"]), shows[v["what"]](v["at_most"]), verdict
        )
    return table


def _comparison(result: dict[str, Any], sizes: Sizes) -> Table:
    versions = result["versions"]
    table = Table(
        title="All figures: median (lowest to highest)", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for name in result["runtimes"]:
        table.add_column(f"{name} {versions.get(name, '')}".strip(), justify="right", no_wrap=True)
    few, many = sizes.turns
    words = {
        "few": few,
        "many": many,
        "text": _mb(sizes.text),
        "file": _mb(sizes.file),
        "batch": sizes.batch,
        "many_calls": sizes.many,
        "prompt": _mb2(sizes.prompt),
        "print": _mb(sizes.prints[0]),
        "print_large": _mb(sizes.prints[1]),
        "tiny": f"{sizes.tiny:,}",
    }
    for case, figure, label, shown in ROWS:
        found = [runtime.get(case) for runtime in result["runtimes"].values()]
        if any(found):
            table.add_row(label.format(**words), *(_cell(r, figure, shown) for r in found))
    return table


def _cell(result: dict[str, Any] | None, figure: str, shown: Callable[[float], str]) -> str:
    if result is None:
        return "-"
    if "failed" in result:
        return "failed"
    values = result["rounds"][figure]
    middle = shown(result["median"][figure])
    if not result["median"][figure]:
        return "-"
    return (
        middle
        if len(values) < 2
        else f"{middle} [dim]({shown(min(values))} to {shown(max(values))})[/]"
    )


# -------------------------------------------------------------------- the command


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rlm_overhead",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--cases", help=f"some of {', '.join(c.name for c in cases(QUICK))}; default: all"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument(
        "--peers",
        default="auto",
        help="auto (this Python's), off, or the path of a Python with them",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, one round: does it run; no targets"
    )
    parser.add_argument(
        "--out", type=Path, help="result; default benchmarks/results/rlm_overhead_<device>.json"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats: expected at least 1.")
    return args


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    sizes = QUICK if args.quick else Sizes()
    console, status = Console(), Console(stderr=True)
    if console.width < 140 and not console.is_terminal:
        console = Console(width=160)  # a file: tables unbroken
    try:
        every = {case.name: case for case in cases(sizes)}
        names = args.cases.split(",") if args.cases else list(every)
        if unknown := [n for n in names if n not in every]:
            raise UserError(f"--cases: {', '.join(unknown)} is none of {', '.join(every)}.")
        found = drivers(args.peers)
        out = (
            args.out
            or record.ROOT
            / "benchmarks"
            / "results"
            / f"rlm_overhead_{record.slug(_device())}.json"
        )
        record.claim(out)
        wanted = [case for name, case in every.items() if name in names]
        result = measure(wanted, found, sizes, 1 if args.quick else args.repeats, status.print)
    except UserError as e:
        status.print(f"error: {e}", markup=False)
        return 2
    show(result, sizes, console)
    if len(found) == 1 and args.peers == "auto":
        console.print(INSTALL, markup=False)
    record.write(out, result)
    console.print(f"Written: {out}", markup=False)
    return int(any("failed" in r for r in result["runtimes"][OURS].values()))


if __name__ == "__main__":
    sys.exit(main())
