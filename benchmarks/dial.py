"""The mean-depth dial on trained checkpoints: loss against depth, and whether the depth asked for
is the depth run.

    # after benchmarks.quality: two runs are its own
    python -m benchmarks.dial --corpus prose.jsonl.gz

Trains (or takes from --workdir) a Mixture-of-Recursions model as configured, expert-choice and
token-choice, an expert-choice one that trained at varied depths (`depth.vary`), and a small one
over bytes made for the dial (`quality_models.py`), all with the true FLOPs of
`benchmarks/quality.py`; then asks each for mean depths from 1 to R on held-out text. Says whether
the loss falls with every step of the dial, and how far the mean depth was off. Thresholds come from
the survey that training left: nothing is fitted to held-out text.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import quality_models as models
from benchmarks import record
from launch.cli import use_compilation_cache
from mor_jax.analysis import units
from mor_jax.analysis.canvas import save_png
from mor_jax.analysis.plots import depth_curves
from mor_jax.errors import UserError
from mor_jax.train.curve import depth_curve
from mor_jax.train.load import load_model
from mor_jax.train.loop import versions
from mor_jax.train.present import CURVE
from mor_jax.train.sweep import jobs, run_sweep

OUT = record.ROOT / "benchmarks" / "results" / "dial_cpu"
ALLOWED = 0.05  # of the mean depth asked for


def verdict(curve: Mapping[str, Any]) -> dict[str, Any]:
    """What a curve shows: relative error of the depth, rises of the loss along the dial."""
    dial = sorted(curve["dial"], key=lambda p: p["asked"])
    errors = [abs(p["mean_depth"] / p["asked"] - 1) for p in dial]
    pairs = list(itertools.pairwise(dial))
    rises = [(a["asked"], b["asked"], b["nll"] - a["nll"]) for a, b in pairs if b["nll"] > a["nll"]]
    return {
        "largest_error": max(errors),
        "within": max(errors) <= ALLOWED,
        "monotone": not rises,
        "rises": rises,
        "fall": dial[0]["nll"] - dial[-1]["nll"],
    }


def sentence(name: str, found: Mapping[str, Any]) -> str:
    """The same for a person."""
    said = f"{name}: the mean depth is off by at most {units.percent(found['largest_error'])}"
    said += f" (allowed {units.percent(ALLOWED, 0)}: {'kept' if found['within'] else 'not kept'})"
    if found["monotone"]:
        return f"{said}; the loss falls with every step of the dial, by {found['fall']:.3f} nats in all."
    worst = max(found["rises"], key=lambda rise: rise[2])
    return (
        f"{said}; the loss is not monotone: it rises in {len(found['rises'])} of the dial's steps, most by {worst[2]:.4f} "
        f"nats from {worst[0]:g} to {worst[1]:g}; from 1 to R it falls by {found['fall']:.3f}."
    )


def show(curves: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """One column of losses a model."""
    asked = sorted({p["asked"] for c in curves.values() for p in c["dial"]})
    table = Table(
        title="Held-out NLL, causal (mean depth measured)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("asked", justify="right")
    for name in curves:
        table.add_column(name, justify="right")
    for depth in asked:
        at = {
            name: next((p for p in c["dial"] if p["asked"] == depth), None)
            for name, c in curves.items()
        }
        table.add_row(
            f"{depth:g}",
            *(f"{p['nll']:.4f} ({p['mean_depth']:.3f})" if p else "" for p in at.values()),
        )
    table.add_row(
        "configured",
        *(
            f"{c['as_configured']['nll']:.4f} ({c['as_configured']['mean_depth']:.3f})"
            for c in curves.values()
        ),
    )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--corpus",
        required=True,
        help="text to train on: a file or glob that config.data.paths takes",
    )
    parser.add_argument(
        "--workdir", default="runs/quality", help="directory of the runs; created, or gone on with"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--flops", type=float, default=models.FLOPS, help="true training FLOPs of each run"
    )
    parser.add_argument(
        "--points", type=int, default=9, help="settings of the dial, evenly from 1 to R"
    )
    parser.add_argument("--rows", type=int, default=256, help="held-out rows of each evaluation")
    parser.add_argument(
        "--models", default=",".join(models.DIALLED), help="of these, separated by commas"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="where the numbers (.json) and the picture (.png) go"
    )
    args = parser.parse_args(arguments)
    use_compilation_cache()
    unknown = [name for name in args.models.split(",") if name not in models.DIALLED]
    if unknown:
        raise UserError(f"--models: {', '.join(unknown)} is none of {', '.join(models.DIALLED)}.")
    record.claim(args.out)
    sweep = models.sweep(args.corpus, args.flops, names=tuple(args.models.split(",")))
    sweep = dataclasses.replace(sweep, seeds=(args.seed,))

    def say(line):
        return print(line, flush=True)

    run_sweep(sweep, args.workdir, progress=sys.stderr.isatty(), say=say, tables=False)
    curves = {}
    for job in jobs(sweep):
        run = Path(args.workdir) / job.name
        say(f"depth curve of {job.point.name}")
        curve = depth_curve(load_model(run), points=args.points, rows=args.rows)
        curves[job.point.labels["model"]] = curve
        (run / CURVE).write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    found = {name: verdict(curve) for name, curve in curves.items()}
    record.write(
        args.out.with_name(args.out.name + ".json"),
        {
            "true_training_flops": args.flops,
            "seed": args.seed,
            "rows": args.rows,
            "curves": curves,
            "verdicts": found,
            "processor": record.processor(),
            "cores": record.cores(),
            "commit": record.commit(),
            "versions": versions(),
        },
    )
    save_png(depth_curves(curves), args.out.with_name(args.out.name + ".png"))
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    show(curves, console)
    for name, of in found.items():
        console.print(f"  {sentence(name, of)}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
