"""Quality at equal training FLOPs: does what the paper found at scale show on two cores, and how
sure can one be?

    python -m benchmarks.quality --corpus prose.jsonl.gz  # about an hour on two quiet cores
    # one seed: no claim can come of it
    python -m benchmarks.quality --corpus prose.jsonl.gz --seeds 0
    python -m benchmarks.quality --corpus prose.jsonl.gz --show  # only what is finished already

Trains every model of `benchmarks/quality_models.py` with each seed, held-out documents kept apart
by their ids, and prints the causal loss on them beside the paper's ordering, with a sentence on
each contrast. Every model gets the same *true* FLOPs (forward and backward, head and router
included, active tokens; token-choice at balanced depths), so that a cheaper token means more of
them. A finished run is not run again and a stopped one goes on: repeat the command. Writes
OUT.json, OUT.png; the runs themselves stay in --workdir, for launch.report and launch.depth_curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import quality_models as models
from benchmarks import record
from launch.cli import use_compilation_cache
from mor_jax.analysis import contrast
from mor_jax.analysis.canvas import save_png
from mor_jax.analysis.sweep import Outcome, Sweep, plot, summarise, to_json, to_table
from mor_jax.errors import UserError
from mor_jax.train.loop import versions
from mor_jax.train.sweep import collect, jobs, run_sweep

OUT = record.ROOT / "benchmarks" / "results" / "quality_cpu"


def values(outcomes: Sequence[Outcome], column: str) -> dict[str, dict[int, float]]:
    """{model: {seed: value}} of the runs that have a number."""
    found: dict[str, dict[int, float]] = {}
    for o in outcomes:
        if o.values.get(column) is not None:
            found.setdefault(o.point.name, {})[o.seed] = o.values[column]
    return found


def judged(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Each contrast, JSON-ready: by the causal loss and, where a router looks ahead in training, by
    the top-k one."""
    causal = contrast.judge(models.CONTRASTS, values(outcomes, "causal/nll"))
    topk = contrast.judge(models.CONTRASTS, values(outcomes, "topk/nll"))
    said = []
    for (c, found), (_, ahead) in zip(causal, topk, strict=True):
        said.append(
            {
                "better": c.better,
                "worse": c.worse,
                "paper": c.paper,
                "source": c.source,
                "sentence": contrast.sentence(c, found),
                "causal": _numbers(found),
                "topk": _numbers(ahead),
            }
        )
    return said


def _numbers(found: contrast.Paired | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "differences": dict(zip(map(str, found.seeds), found.differences, strict=True)),
        "mean": found.mean,
        "interval": found.interval,
        "verdict": found.verdict,
    }


def show(sweep: Sweep, outcomes: Sequence[Outcome], console: Console) -> None:
    """The table and a sentence for each contrast."""
    console.print(to_table(sweep, outcomes))
    console.print(
        f"Differences are paired by seed; intervals are Student's t at {contrast.LEVEL:.0%}, each contrast on its own.\n"
        "The paper's NLL of a routed model is top-k, which sees the future; ours is causal unless it says otherwise.\n"
    )
    for said in judged(outcomes):
        console.print(f"  {said['sentence']}", highlight=False)
        causal, topk = said["causal"], said["topk"]
        if topk and causal and topk["differences"] != causal["differences"]:
            bounds = topk["interval"]
            within = f", {bounds[0]:+.3f} to {bounds[1]:+.3f}" if bounds else ""
            console.print(f"      by the top-k loss: {topk['mean']:+.3f}{within}", highlight=False)


def result(sweep: Sweep, outcomes: Sequence[Outcome], flops: float) -> dict[str, Any]:
    """What is written: every run, every point, every contrast, and where the numbers come from."""
    return {
        "true_training_flops": flops,
        "shape": dict(sweep.base["model"]),
        "interval": f"Student's t of the differences paired by seed, {contrast.LEVEL:.0%}, two-sided",
        **to_json(sweep, outcomes),
        "contrasts": judged(outcomes),
        "processor": record.processor(),
        "cores": record.cores(),
        "commit": record.commit(),
        "versions": versions(),
    }


def write(sweep: Sweep, outcomes: Sequence[Outcome], flops: float, out: Path) -> None:
    """OUT.json and OUT.png of the runs there are."""
    record.write(out.with_name(out.name + ".json"), result(sweep, outcomes, flops))
    if summarise(sweep, [o for o in outcomes if not o.failure]):
        save_png(plot(sweep, outcomes), out.with_name(out.name + ".png"))


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
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument(
        "--flops", type=float, default=models.FLOPS, help="true training FLOPs of each run"
    )
    parser.add_argument(
        "--models", default="", help="only these, separated by commas; default: all"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="where the numbers (.json) and the picture (.png) go"
    )
    parser.add_argument("--show", action="store_true", help="train nothing, show what is finished")
    args = parser.parse_args(arguments)
    use_compilation_cache()
    try:
        seeds = tuple(map(int, args.seeds.split(",")))
    except ValueError as e:
        raise UserError(
            f"--seeds must be whole numbers separated by commas, got {args.seeds!r}."
        ) from e
    sweep = dataclasses.replace(models.sweep(args.corpus, args.flops), seeds=seeds)
    if args.models:
        known = [p.name for p in sweep.points]
        unknown = [n for n in args.models.split(",") if n not in known]
        if unknown:
            raise UserError(f"--models: {', '.join(unknown)} is none of {', '.join(known)}.")
        sweep = dataclasses.replace(
            sweep, points=tuple(p for p in sweep.points if p.name in args.models.split(","))
        )
    record.claim(args.out)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        # Groups one after the other, seeds outermost within each: a command that is stopped has
        # whole groups of them.
        for group in () if args.show else models.groups(sweep):
            run_sweep(
                group,
                args.workdir,
                progress=sys.stderr.isatty(),
                say=lambda line: print(line, flush=True),
                tables=False,
            )
    finally:
        outcomes = collect(jobs(sweep), args.workdir)
        write(sweep, outcomes, args.flops, args.out)
        show(sweep, outcomes, console)
        missing = len(sweep.points) * len(sweep.seeds) - len(outcomes)
        if missing:
            console.print(
                f"\n{missing} runs are not finished; the same command goes on from here.",
                highlight=False,
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
