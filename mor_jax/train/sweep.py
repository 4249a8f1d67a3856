"""Running a sweep: every point with every seed, resumable, in this process or several at a time.

    <workdir>/<point>/seed<k>/   a run directory like any other
    <workdir>/sweep.json, .csv, .md, .png
    <workdir>/logs/              what runs in other processes printed

What is finished is not run again, what was interrupted goes on by `train`'s own resume. A run that
diverged leaves diverged.json and counts as finished: its divergence is the result (delete the file
to try again).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from mor_jax.analysis import sweep as results
from mor_jax.analysis.canvas import save_png
from mor_jax.analysis.runs import RunRecord, number
from mor_jax.analysis.sweep import Outcome, Point, Sweep
from mor_jax.config import Config, from_config_dict, from_dict, switched
from mor_jax.errors import ConfigError, UserError
from mor_jax.paths import as_path, is_local, write_text
from mor_jax.train.faults import TrainingError
from mor_jax.train.loop import train
from mor_jax.train.workdir import differences

DIVERGED = "diverged.json"
# Each variable makes one kind of accelerator see one device only; the others ignore it.
ONE_DEVICE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS")


@dataclasses.dataclass(frozen=True)
class SweepJob:
    """One run of a sweep."""

    point: Point
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.point.name}/seed{self.seed}"


def jobs(
    sweep: Sweep, *, fields: Mapping[str, Any] | None = None, devices: int = 1
) -> list[SweepJob]:
    """All runs of a sweep, seeds outermost, so that a sweep that is cut short has every point once.

    The seed is that of the initialisation and of the order of the rows.

    Args:
      fields: configuration fields that override those of every point, e.g. {"train.steps": 100}.
      devices: number that the mesh of each run spans.
    Raises:
      ConfigError: a configuration that cannot be run, with the name of its point; nothing has been
        run then.
    """
    found = []
    for seed in sweep.seeds:
        for point in sweep.points:
            raw = _plain(sweep.base)
            seeds = {"train.seed": seed, "data.seed": seed}
            given = dict(point.fields) | dict(fields or {})
            for key, value in ({"name": point.name} | given | seeds).items():
                _set(raw, key, value, point.name)
            try:
                if "depth.policy" in given:  # what the base set for another policy is left behind
                    raw["depth"] = switched(
                        raw["depth"], [key.removeprefix("depth.") for key in given]
                    )
                found.append(SweepJob(point, seed, from_config_dict(raw, devices=devices)))
            except ConfigError as e:
                raise ConfigError(f"point {point.name!r} of the sweep: {e}") from e
    return found


def run_sweep(
    sweep: Sweep,
    workdir: str | os.PathLike[str],
    *,
    fields: Mapping[str, Any] | None = None,
    command: Callable[[str], Sequence[str]] | None = None,
    slots: Sequence[str] = ("",),
    say: Callable[[str], None] = print,
    progress: bool = True,
    tables: bool = True,
) -> list[Outcome]:
    """Run what is not finished yet, write the results, return those there are.

    Args:
      fields: see `jobs`.
      command: the command line that runs the job of a name alone; with it, jobs run in other
        processes, one in each of `slots` at a time. Without it: one after the other in this one.
      slots: device number of each process, "" for whatever it finds.
      say: takes a line about what happens.
      tables: write the sweep's results into `workdir`.
    Raises:
      UserError: a run failed for another reason than divergence, or the sweep was stopped; finished
        runs are kept.
    """
    workdir = as_path(workdir)
    # Counting devices would take hold of them, and they are for the other processes.
    todo = jobs(sweep, fields=fields, devices=1 if command else jax.device_count())
    waiting = [job for job in todo if not finished(workdir / job.name, job.config)]
    say(f"{sweep.title}: {len(todo)} runs, {len(todo) - len(waiting)} of them finished.")
    try:
        if command:
            _in_processes(waiting, workdir, command, slots, say)
        else:
            for i, job in enumerate(waiting, 1):
                say(f"[{i}/{len(waiting)}] {job.name}")
                if not run_job(job, workdir, progress=progress):
                    raise UserError("stopped; the same command goes on from here.")
    finally:
        outcomes = collect(todo, workdir)
        if tables:
            write_results(sweep, outcomes, workdir)
    return outcomes


def run_job(job: SweepJob, workdir: str | os.PathLike[str], *, progress: bool = True) -> bool:
    """Train one run to its end; False if it was stopped before. Divergence is an end."""
    directory = as_path(workdir) / job.name
    try:
        return bool(train(job.config, directory, progress=progress).get("finished"))
    except TrainingError as e:
        write_text(directory / DIVERGED, json.dumps({"error": str(e)}) + "\n")
        return True


def finished(directory: epath.Path, cfg: Config) -> bool:
    """Whether `directory` holds this very run, ended. Raises ConfigError if it holds another
    one."""
    if not any((directory / name).exists() for name in ("summary.json", DIVERGED)):
        return False
    try:
        saved = from_dict(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{directory}/config.json cannot be read ({e}); delete the directory to run it anew."
        ) from e
    if not cfg.model.vocab_size:  # left to the tokenizer, which the run has asked
        cfg = dataclasses.replace(
            cfg, model=dataclasses.replace(cfg.model, vocab_size=saved.model.vocab_size)
        )
    changed = differences(saved.to_dict(), cfg.to_dict(), paths=True)
    if changed:
        raise ConfigError(
            f"{directory} holds a run of another configuration ({'; '.join(changed)}). Give another --workdir."
        )
    return True


def collect(todo: Sequence[SweepJob], workdir: str | os.PathLike[str]) -> list[Outcome]:
    """The outcome of every job that has ended."""
    found = []
    for job in todo:
        directory = as_path(workdir) / job.name
        if (directory / "summary.json").exists():
            found.append(Outcome(job.point, job.seed, numbers(directory)))
        elif (directory / DIVERGED).exists():
            why = json.loads((directory / DIVERGED).read_text(encoding="utf-8"))["error"]
            found.append(Outcome(job.point, job.seed, failure=why))
    return found


def numbers(directory: str | os.PathLike[str]) -> dict[str, float | None]:
    """What a finished run can show, by column of `analysis.sweep.COLUMNS`."""
    run = RunRecord.load(directory)
    _, losses = run.series("lm_loss")
    tail = losses[-max(1, len(losses) // 10) :]
    summary = run.summary or {}
    special = {
        "train_nll": sum(tail) / len(tail) if tail else None,  # over the last tenth of the run
        "non_embedding": (summary.get("parameters") or {}).get("non_embedding"),
        "paper_flops": summary.get("paper_training_flops"),
        "true_flops": summary.get("true_training_flops"),
        "steps": summary.get("steps"),
        "tokens": summary.get("tokens"),
    }
    last = run.train[-1] if run.train else {}
    return {
        column: number(special[column])
        if column in special
        else number(_either(run.last_eval(column), last.get(column)))
        for column in results.COLUMNS
    }


def write_results(sweep: Sweep, outcomes: Sequence[Outcome], workdir: epath.Path) -> None:
    """sweep.json, sweep.csv, sweep.md and sweep.png of the runs there are."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(
            workdir / "sweep.json", json.dumps(results.to_json(sweep, outcomes), indent=1) + "\n"
        )
        write_text(workdir / "sweep.csv", results.to_csv(sweep, outcomes))
        write_text(workdir / "sweep.md", results.to_markdown(sweep, outcomes))
        if any(not o.failure for o in outcomes):
            save_png(results.plot(sweep, outcomes), workdir / "sweep.png")
    except OSError as e:
        raise UserError(f"cannot write the results to {workdir}: {e.strerror or e}.") from e


# ---------------------------------------------------------------- several at a time


def _in_processes(
    waiting: Sequence[SweepJob],
    workdir: epath.Path,
    command: Callable[[str], Sequence[str]],
    slots: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """One process a job, one in each slot at a time; stops them all, saved, when told to stop."""
    queue, free = list(waiting), list(slots)
    running: dict[subprocess.Popen[bytes], tuple[SweepJob, str, Path]] = {}
    # A process can write to a file of this machine only.
    logs = (
        Path(workdir) / "logs"
        if is_local(workdir)
        else Path(tempfile.mkdtemp(prefix="mor_jax_logs_"))
    )
    broken: list[str] = []
    with _stop_signal() as stop:
        while running or (queue and not broken and not stop):
            while queue and free and not broken and not stop:
                job, slot = queue.pop(0), free.pop(0)
                log = logs / f"{job.name.replace('/', '-')}.txt"
                log.parent.mkdir(parents=True, exist_ok=True)
                env = os.environ | ({name: slot for name in ONE_DEVICE} if slot else {})
                with log.open("w") as out:
                    # A session of its own: Ctrl-C reaches this process alone, which then asks each
                    # run once to save.
                    process = subprocess.Popen(
                        command(job.name),
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env=env,
                        start_new_session=True,
                    )
                running[process] = (job, slot, log)
                say(f"started {job.name}" + (f" on device {slot}" if slot else ""))
            for process in [p for p in running if p.poll() is not None]:
                job, slot, log = running.pop(process)
                free.append(slot)
                if process.returncode and not stop:
                    broken.append(
                        f"{job.name} ended with status {process.returncode}: {_last_line(log)}"
                    )
                say(f"{'stopped' if stop else 'ended'} {job.name}")
            if stop and not stop.sent:
                stop.sent = True
                for process in running:
                    process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
    if broken:
        raise UserError(f"{broken[0]} (logs in {logs})")
    if stop:
        raise UserError("stopped; the same command goes on from here.")


class _Stop:
    """Truthy once a signal has come."""

    def __init__(self) -> None:
        self.asked = self.sent = False

    def __bool__(self) -> bool:
        return self.asked


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
    stop, previous = _Stop(), {}

    def handler(_number: int, _frame: Any) -> None:
        stop.asked = True

    with contextlib.suppress(ValueError):  # not the main thread
        for number_ in (signal.SIGTERM, signal.SIGINT):
            previous[number_] = signal.signal(number_, handler)
    try:
        yield stop
    finally:
        for number_, old in previous.items():
            signal.signal(number_, old)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _plain(tree: Any) -> dict[str, Any]:
    """A nested dict of its own, whatever kind of mapping came in."""
    return json.loads(json.dumps(tree.to_dict() if hasattr(tree, "to_dict") else tree))


def _set(raw: dict[str, Any], key: str, value: Any, where: str) -> None:
    *groups, leaf = key.split(".")
    for group in groups:
        raw = raw.setdefault(group, {})
        if not isinstance(raw, dict):
            raise ConfigError(
                f"point {where!r} of the sweep: config.{key} is below a field that holds no others."
            )
    raw[leaf] = value


def _either(first: Any, second: Any) -> Any:
    return second if first is None else first
