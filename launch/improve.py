"""Let a model that leads the runtime learn from its own runs (expert iteration).

    python -m launch.improve --config configs/native_rlm.py:stage=improve --init_from runs/native \\
        --workdir runs/improved --tasks s_niah,niah_multiquery --rounds 4 --runs 128 --draws 4
    python -m launch.improve ... --workdir runs/sft --samples native/train.jsonl

A round: the model leads `runs` problems `draws` times each, at a temperature; of each problem the
right run with the fewest turns is kept; the model is trained on those and on the ones of earlier
rounds, starting from its weights of the round before. Before the first round and after each, it
answers held-out problems (other sentences, questions, strings and seeds). It ends early where
`patience` rounds in a row are no better than the best.

With --samples FILE each round trains on that file instead, for as many steps: what more supervised
training at the same number of updates would have brought.

The directory receives round-<n>/rollouts.jsonl, samples.jsonl and run/, and improve.json with the
curve (improve.png). The same command goes on where it was stopped. The result of round n is
`checkpoint:<workdir>/round-<n>/run`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli
from mor_jax.config import Config
from mor_jax.errors import UserError
from mor_jax.paths import write_text
from mor_jax.train.load import load_model
from mor_jax.train.loop import train

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the rounds.", required=True)
_INIT_FROM = flags.DEFINE_string("init_from", None, "Model of the first round.", required=True)
_TASKS = flags.DEFINE_list("tasks", ["s_niah"], "Tasks with an expert (see rlm tasks).")
_ROUNDS = flags.DEFINE_integer("rounds", 4, "Rounds at most.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 128, "Problems of a round.", lower_bound=1)
_DRAWS = flags.DEFINE_integer("draws", 4, "Runs of each problem.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "Of the runs.", lower_bound=0.0)
_LENGTH = flags.DEFINE_integer("length", 4000, "Tokens of the contexts.", lower_bound=1000)
_EVAL_RUNS = flags.DEFINE_integer("eval_runs", 64, "Held-out problems.", lower_bound=1)
_PATIENCE = flags.DEFINE_integer("patience", 2, "Rounds without a gain.", lower_bound=1)
_SAMPLES = flags.DEFINE_string("samples", "", "Train on this file instead of the model's own runs.")
_SEED = flags.DEFINE_integer("seed", 0, "Of problems, draws and training.", lower_bound=0)

EVAL_SEED = 7_000_000  # of the held-out problems: the same in every round and for every seed


def main(_: list[str]) -> None:
    from rlm_runtime.errors import RlmError

    cfg, workdir = cli.read_config(_CONFIG), Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        curve = _rounds(cfg, workdir)
    except RlmError as error:
        raise UserError(str(error)) from error
    print(f"best: round {_best(curve)} of {curve[-1]['round']}; {workdir / 'improve.json'}")


def _rounds(cfg: Config, workdir: Path) -> list[dict[str, Any]]:
    """The curve, a point a round; it is written after each."""
    from rlm_runtime.lms.checkpoint import CheckpointLM
    from rlm_runtime.training import rollouts

    start, curve, paths = _INIT_FROM.value, [], []
    lm: CheckpointLM | None = None
    for n in range(_ROUNDS.value + 1):
        model = load_model(start)
        if lm is None:
            lm = CheckpointLM(start, model=model, max_tokens=256)
        else:
            lm.set_params(model.params)
        folder = workdir / f"round-{n}"
        folder.mkdir(exist_ok=True)
        runs = _led(lm, folder / "heldout.jsonl", EVAL_SEED, "heldout", _EVAL_RUNS.value, 1, 0.0)
        curve.append({"round": n, **_summary(runs), "checkpoint": start})
        _write(workdir, curve)
        if n == _ROUNDS.value or n - _best(curve) >= _PATIENCE.value:
            break
        if _SAMPLES.value:
            paths = [_SAMPLES.value]
        else:
            seed = _SEED.value * 1000 + n
            drawn = _led(
                lm,
                folder / "rollouts.jsonl",
                seed,
                "train",
                _RUNS.value,
                _DRAWS.value,
                _TEMPERATURE.value,
            )
            kept = rollouts.best(drawn)
            if not kept:
                raise UserError(
                    f"round {n}: none of {len(drawn)} runs was right, so there is nothing to learn from. "
                    "Begin with a better model, easier tasks or more draws."
                )
            curve[-1] |= {"rollouts": _summary(drawn), "kept": len(kept)}
            write_text(folder / "samples.jsonl", "".join(c.line() for c in kept))
            paths.append(str(folder / "samples.jsonl"))
        trained = dataclasses.replace(
            cfg,
            data=dataclasses.replace(cfg.data, paths=tuple(paths), seed=cfg.data.seed + n),
            train=dataclasses.replace(cfg.train, seed=_SEED.value),
        )
        train(trained, folder / "run", init_from=start)
        start = str(folder / "run")
    return curve


def _led(
    lm: Any, out: Path, seed: int, split: str, runs: int, draws: int, temperature: float
) -> list[Any]:
    from rich.progress import Progress

    from rlm_runtime.training.rollouts import roll_out

    with Progress(transient=True) as bar:
        task = bar.add_task(f"{out.parent.name}: {split} runs", total=runs * draws)
        return asyncio.run(
            roll_out(
                lm,
                _TASKS.value,
                runs,
                out=out,
                seed=seed,
                split=split,
                length=_LENGTH.value,
                draws=draws,
                temperature=temperature,
                on_run=lambda run: bar.advance(task),
            )
        )


def _summary(runs: list[Any]) -> dict[str, Any]:
    """Share of right runs with its 95 % interval, over all and by task."""
    from rlm_runtime.tasks.results import interval

    right = [float(run.score == 1) for run in runs]
    low, high = interval(right)
    by_task = {
        name: sum(run.score == 1 for run in runs if run.task == name)
        / sum(run.task == name for run in runs)
        for name in sorted({run.task for run in runs})
    }
    return {
        "runs": len(runs),
        "success": sum(right) / len(right),
        "low": low,
        "high": high,
        "turns": sum(run.turns for run in runs) / len(runs),
        "tasks": by_task,
    }


def _best(curve: list[dict[str, Any]]) -> int:
    """The first round with the highest success."""
    return max(curve, key=lambda point: (point["success"], -point["round"]))["round"]


def _write(workdir: Path, curve: list[dict[str, Any]]) -> None:
    write_text(workdir / "improve.json", json.dumps(curve, indent=1) + "\n")
    point = curve[-1]
    print(
        f"round {point['round']}: {point['success']:.1%} of {point['runs']} held-out problems "
        f"({point['low']:.0%} to {point['high']:.0%}), {point['turns']:.1f} turns",
        flush=True,
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    rounds = [p["round"] for p in curve]
    axes.fill_between(rounds, [p["low"] for p in curve], [p["high"] for p in curve], alpha=0.2)
    axes.plot(rounds, [p["success"] for p in curve], marker="o", label="all")
    for name in point["tasks"]:
        axes.plot(rounds, [p["tasks"][name] for p in curve], linewidth=1, label=name)
    axes.set(xlabel="round", ylabel="right, of held-out problems", ylim=(0, 1), xticks=rounds)
    axes.legend()
    figure.savefig(workdir / "improve.png", dpi=120)


if __name__ == "__main__":
    cli.run(main)
