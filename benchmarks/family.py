"""The recursion family on bytes of text, at equal true training FLOPs: one table.

    python -m benchmarks.family --corpus prose.jsonl.gz --seeds 0  # some 20 minutes of two cores

Every model has 8 unrolled layers of width 128 (RINS 9; the equilibrium model up to 18), one recipe,
and as many steps as the budget pays for, backward pass, head and losses over steps included
(`mor_jax/analysis/accounting.py`; of an equilibrium model all steps it may take). Held-out
documents are apart by their ids. "Rate" is the true FLOPs a second of a model's training step over
those of the recursive one: where it needs fewer FLOPs a token, the share of that saving which the
clock sees. A finished run is not run again. Writes OUT.json; the runs stay in --workdir, for
launch.report and launch.depth_curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import quality_models, record
from launch.cli import use_compilation_cache
from mor_jax.analysis.sweep import Outcome, Sweep, to_json, to_table
from mor_jax.errors import UserError
from mor_jax.train.loop import versions
from mor_jax.train.sweep import collect, jobs, run_sweep

OUT = record.ROOT / "benchmarks" / "results" / "family_cpu.json"
FLOPS = 2.5e12  # true training FLOPs of a run
BASELINE = "recursive"

_BYTES = {"data.tokenizer": "bytes", "model.vocab_size": 320}


def _program(prelude: int, core: int, coda: int, recursions: int, **more: Any) -> dict[str, Any]:
    return {
        "model.sharing": "cycle",
        "model.prelude": prelude,
        "model.coda": coda,
        "model.recursions": recursions,
        "model.layers": prelude + core * recursions + coda,
        **{name.replace("__", "."): value for name, value in more.items()},
    }


MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    BASELINE: quality_models.MODELS["recursive"],
    "MoR expert": quality_models.MODELS["MoR expert"],
    "MoR token": quality_models.MODELS["MoR token"],
    "RINS": _program(0, 3, 3, 2),
    "Huginn": _program(
        1,
        2,
        1,
        3,
        model__norm_placement="sandwich_out",
        recursion__state="random",
        recursion__injection="concat",
        recursion__sampling="lognormal_poisson",
        recursion__gradient_steps=3,
    ),
    "Ouro": _program(
        0,
        2,
        0,
        4,
        model__norm_placement="sandwich_in",
        recursion__loss="gate",
        recursion__loop_norm=True,
    ),
    "PonderNet": _program(
        0,
        2,
        0,
        4,
        recursion__injection="add",
        recursion__loss="gate",
        recursion__gate_prior="geometric",
        recursion__gate_rate=0.3,
        recursion__gate_weight=0.01,
    ),
    "DEQ": _program(
        1,
        2,
        1,
        8,
        model__norm_placement="post",
        recursion__injection="add",
        recursion__solver="anderson",
        recursion__tolerance=0.01,
        recursion__adjoint_steps=1,
    ),
}


def sweep(corpus: str, flops: float, names: Sequence[str], seeds: tuple[int, ...]) -> Sweep:
    """These models, each with the steps that the budget pays for."""
    recipe = quality_models.base(corpus)
    points = []
    for name in names:
        fields = _BYTES | MODELS[name]
        steps = quality_models.steps_for(recipe, fields, flops)
        points.append({"labels": {"model": name}, "fields": fields | {"train.steps": steps}})
    found = Sweep.from_dict(
        {
            "title": "The recursion family at equal training FLOPs",
            "base": recipe,
            "points": points,
            "columns": (
                "causal/bits_per_byte",
                "causal/mean_depth",
                "non_embedding",
                "steps",
                "tokens",
                "true_flops",
                "tokens_per_s",
            ),
        }
    )
    return dataclasses.replace(found, seeds=seeds)


def rates(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """True FLOPs a second of each model's step over those of the recursive one, means over
    seeds."""
    found: dict[str, list[float]] = {}
    for o in outcomes:
        speed, flops, tokens = (o.values.get(k) for k in ("tokens_per_s", "true_flops", "tokens"))
        if speed and flops and tokens:
            found.setdefault(o.point.labels["model"], []).append(speed * flops / tokens)
    means = {name: sum(of) / len(of) for name, of in found.items()}
    base = means.get(BASELINE)
    return {name: of / base for name, of in means.items()} if base else {}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--corpus", required=True, help="text: a file that config.data.paths takes")
    parser.add_argument("--workdir", default="runs/family", help="directory of the runs")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--flops", type=float, default=FLOPS, help="true training FLOPs of a run")
    parser.add_argument("--models", default=",".join(MODELS), help="which, separated by commas")
    parser.add_argument("--out", type=Path, default=OUT, help="where the numbers go")
    parser.add_argument("--show", action="store_true", help="train nothing, show what is finished")
    args = parser.parse_args(arguments)
    use_compilation_cache()
    names = args.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        raise UserError(f"--models: {', '.join(unknown)} is none of {', '.join(MODELS)}.")
    try:
        seeds = tuple(map(int, args.seeds.split(",")))
    except ValueError as e:
        raise UserError(
            f"--seeds must be whole numbers separated by commas, got {args.seeds!r}."
        ) from e
    whole = sweep(args.corpus, args.flops, names, seeds)
    record.claim(args.out)
    try:
        if not args.show:
            run_sweep(
                whole,
                args.workdir,
                progress=sys.stderr.isatty(),
                say=lambda line: print(line, flush=True),
                tables=False,
            )
    finally:
        outcomes = collect(jobs(whole), args.workdir)
        found = rates(outcomes)
        of_run = {
            "true_training_flops": args.flops,
            **to_json(whole, outcomes),
            "rates": found,
            "processor": record.processor(),
            "cores": record.cores(),
            "commit": record.commit(),
            "versions": versions(),
        }
        record.write(args.out, of_run)
        console = Console(width=None if sys.stdout.isatty() else 150)
        console.print(to_table(whole, outcomes))
        speed = Table("model", "rate", title=f"True FLOPs a second, {BASELINE} = 1")
        for name, rate in found.items():
            speed.add_row(name, f"{rate:.2f}")
        console.print(speed)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
