"""Run an ablation: a grid of configurations, several seeds, one table with mean ± spread and one
plot.

    python -m launch.sweep configs/ablations/sharing.py:tiny --workdir runs/sharing
    python -m launch.sweep configs/ablations/routers.py:small --workdir runs/routers --seeds 0,1,2
    python -m launch.sweep configs/ablations/isoflop.py:360m --workdir runs/iso --devices 0,1,2,3
    python -m launch.sweep configs/ablations/sharing.py:small --workdir runs/x \\
        --set train.steps=200 --dry_run
    python -m launch.sweep configs/ablations/isoflop.py:360m --workdir /shared/iso \\
        --launcher slurm --with=--nodes=2

After the colon: the size; tiny (seconds a run), small (minutes on two cores) or one of the paper's.
Each run is a run directory of its own; the same command skips what is finished and goes on with
what was interrupted. The workdir receives sweep.json, sweep.csv, sweep.md and sweep.png. Published
numbers are shown beside ours with their scale. With --launcher each run is a job of its own: local
(processes here, waited for), slurm, gke or tpu_vm (handed over; the same command later hands over
what is not finished, and writes the results there are).

From a notebook:

    from mor_jax.train.sweep import run_sweep
    run_sweep(Sweep.from_dict(sharing.get_sweep("tiny")), "runs/sharing")
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from launch import cli
from launch.jobs import LAUNCHERS, launcher_command, run_line, shell_line
from mor_jax.analysis.sweep import Sweep, to_table
from mor_jax.errors import UserError
from mor_jax.paths import as_path
from mor_jax.train.sweep import collect, finished, jobs, run_job, run_sweep, write_results

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the sweep; created, or gone on with.", required=True
)
_SEEDS = flags.DEFINE_list("seeds", [], "Seeds instead of the file's, e.g. 0,1,2,3,4.")
_SET = flags.DEFINE_multi_string(
    "set", [], "field=value for every run, e.g. --set train.steps=200; repeatable."
)
_PARALLEL = flags.DEFINE_integer(
    "parallel", 1, "Runs at a time, each a process of its own.", lower_bound=1
)
_DEVICES = flags.DEFINE_list(
    "devices", [], "Accelerators to spread runs over, one run on each at a time: 0,1,2,3."
)
_RUN = flags.DEFINE_string(
    "run", None, "This one run alone, e.g. cycle-N_r2/seed0: for cluster jobs and --parallel."
)
_LAUNCHER = flags.DEFINE_enum(
    "launcher", None, LAUNCHERS, "Run each run as a job of its own by this launcher."
)
_WITH = flags.DEFINE_multi_string(
    "with", [], "Option of the launcher, e.g. --with=--processes=2; repeatable."
)
_DRY = flags.DEFINE_bool(
    "dry_run", False, "List the runs (with --launcher: the commands) and stop."
)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UserError(
            "name one sweep file, e.g. python -m launch.sweep configs/ablations/sharing.py:tiny."
        )
    sweep, fields = cli.read_sweep(arguments[0], _SEEDS.value), cli.read_fields(_SET.value)
    if _LAUNCHER.value and not _RUN.value:
        _launch(sweep, arguments[0], fields, _LAUNCHER.value)
        return
    if _DRY.value:
        print("\n".join(job.name for job in jobs(sweep, fields=fields)))
        return
    if _RUN.value:
        found = [job for job in jobs(sweep, fields=fields) if job.name == _RUN.value]
        if not found:
            raise UserError(f"the sweep has no run {_RUN.value!r}; --dry_run lists them.")
        run_job(found[0], _WORKDIR.value)
        return

    def alone(name: str) -> list[str]:
        return run_line([sys.executable, "-m", "launch.sweep", *sys.argv[1:], f"--run={name}"])

    slots = _DEVICES.value or [""] * _PARALLEL.value
    outcomes = run_sweep(
        sweep,
        _WORKDIR.value,
        fields=fields,
        command=alone if len(slots) > 1 or _DEVICES.value else None,
        slots=slots,
    )
    Console(highlight=False).print(to_table(sweep, outcomes))
    print(f"wrote {_WORKDIR.value}/sweep.json, sweep.csv, sweep.md and sweep.png")


def _launch(sweep: Sweep, file: str, fields: dict[str, Any], launcher: str) -> None:
    """Every run that is not finished, by the launcher."""
    workdir = as_path(_WORKDIR.value)
    seeds = [f"--seeds={','.join(_SEEDS.value)}"] if _SEEDS.value else []
    own = [
        "launch.sweep",
        file,
        f"--workdir={workdir}",
        *seeds,
        *[f"--set={v}" for v in _SET.value],
    ]

    def name(run: str) -> str:
        return f"{Path(file.partition(':')[0]).stem}-{run}"

    def command(run: str) -> list[str]:
        return launcher_command(launcher, _WITH.value, [*own, f"--run={run}"], name(run))

    todo = jobs(sweep, fields=fields)
    waiting = [job for job in todo if not finished(workdir / job.name, job.config)]
    if _DRY.value:
        print("\n".join(shell_line(command(job.name)) for job in waiting))
        return
    if launcher == "local":
        outcomes = run_sweep(
            sweep, workdir, fields=fields, command=command, slots=[""] * _PARALLEL.value
        )
    else:
        for job in waiting:
            try:
                subprocess.run(command(job.name), check=True)
            except (OSError, subprocess.CalledProcessError) as e:
                raise UserError(f"{job.name} was not handed over: {e}") from e
        outcomes = collect(todo, workdir)
        write_results(sweep, outcomes, workdir)
    Console(highlight=False).print(to_table(sweep, outcomes))


if __name__ == "__main__":
    cli.run(main, arguments=True)
