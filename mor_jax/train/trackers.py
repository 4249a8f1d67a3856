"""Where the numbers of a run go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, or
anything with three methods (`config.train.trackers`)."""

from __future__ import annotations

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from mor_jax.errors import ConfigError, UserError

# in the run directory: what each tracker calls this run, so that a resumed run goes on there
IDS = "trackers.json"


class TrackedRun(NamedTuple):
    """What a tracker is made for."""

    name: str
    config: Mapping[str, Any]  # `Config.to_dict`
    directory: Path  # of this machine, for its files
    resume_step: int  # records of later steps come again; 0: a new run


class Tracker(Protocol):
    """Takes the records of one run. Any exception ends its part in the run, not the run."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers of one record; `kind` is train, eval, eval_average, goodput or hosts."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in tensorboard/."""

    def __init__(self, run: TrackedRun):
        from tensorboardX import SummaryWriter

        purge = run.resume_step + 1 if run.resume_step else None
        self._board = SummaryWriter(str(run.directory / "tensorboard"), purge_step=purge)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WandB:
    """A run of Weights & Biases; project, entity and mode are its own environment variables
    (WANDB_PROJECT, ...)."""

    def __init__(self, run: TrackedRun):
        wandb = _package("wandb", "wandb")
        made = _id_of(run.directory, "wandb", lambda: uuid.uuid4().hex[:16])
        self._run = wandb.init(
            id=made,
            resume="allow",
            name=run.name,
            config=dict(run.config),
            dir=str(run.directory),
            reinit="create_new",
        )
        # Its own step may not go back, as a run that resumes does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | {f"{kind}/{name}": value for name, value in values.items()})

    def flush(self) -> None:
        """It sends on its own."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI and in the experiment MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, run: TrackedRun):
        mlflow = _package("mlflow", "mlflow")
        self._client = mlflow.MlflowClient()

        def made() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mor_jax")
            experiment = self._client.get_experiment_by_name(name)
            number = (
                experiment.experiment_id if experiment else self._client.create_experiment(name)
            )
            return self._client.create_run(number, run_name=run.name).info.run_id

        self._id = _id_of(run.directory, "mlflow", made)
        self._client.update_run(self._id, status="RUNNING")
        self._entities = importlib.import_module("mlflow.entities")
        if not run.resume_step:
            params = [
                self._entities.Param(name, str(value)[:500]) for name, value in _flat(run.config)
            ]
            for first in range(0, len(params), 100):  # at most so many a request
                self._client.log_batch(self._id, params=params[first : first + 100])

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        made = [
            self._entities.Metric(f"{kind}/{name}", value, now, step)
            for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=made)

    def flush(self) -> None:
        """Each record is sent as it is written."""

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


def open_trackers(names: Sequence[str], run: TrackedRun) -> dict[str, Tracker]:
    """Trackers by name: one of TRACKERS, or "package.module:factory", which is called with the
    TrackedRun.

    Raises:
      ConfigError: no such tracker.
      UserError: its package is not installed.
    """
    return {name: _factory(name)(run) for name in names}


def _factory(name: str) -> Callable[[TrackedRun], Tracker]:
    if name in TRACKERS:
        return TRACKERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(
            f"config.train.trackers: {name!r} is none of {', '.join(TRACKERS)}, and no 'package.module:factory'."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"config.train.trackers: {name!r} cannot be imported: {e}.") from e


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the values of a record."""

    def number(v: object) -> bool:
        return isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)

    return {name: value for name, value in values.items() if number(value)}


def _package(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f'config.train.trackers names {name!r}, which is not installed: pip install ".[{extra}]".'
        ) from None


def _id_of(directory: Path, tracker: str, make: Callable[[], str]) -> str:
    """What the tracker calls this run; made and noted the first time."""
    path = directory / IDS
    ids = json.loads(path.read_text()) if path.exists() else {}
    if tracker not in ids:
        ids[tracker] = make()
        path.write_text(json.dumps(ids) + "\n")
    return ids[tracker]


def _flat(tree: Mapping[str, Any], where: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in tree.items()
        for pair in (
            _flat(value, f"{where}{name}.")
            if isinstance(value, Mapping)
            else [(f"{where}{name}", value)]
        )
    ]
