"""Loss against depth on one checkpoint: the mean-depth dial, and test-time scaling under a cap on
every depth."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mor_jax.data.loader import eval_batches
from mor_jax.data.prepare import prepare
from mor_jax.errors import UserError
from mor_jax.inference.dial import calibrate, has_survey
from mor_jax.model.depth.survey import SURVEY
from mor_jax.train.evaluate import evaluate_at
from mor_jax.train.load import Loaded
from mor_jax.train.score import held_out

CALIBRATION_ROWS = 128


def surveyed(
    loaded: Loaded, *, rows: int = 0, batch_size: int = 8, progress: bool = True
) -> Loaded:
    """The model with a survey of its router scores, so that its mean depth can be dialled.

    Args:
      rows: take a fresh survey from so many training rows; 0: only where the checkpoint has none.
    """
    if SURVEY not in loaded.params["router"] or (has_survey(loaded.params) and not rows):
        return loaded
    rows = rows or CALIBRATION_ROWS
    print(f"Surveying router scores on {rows} training rows.", file=sys.stderr)
    data = prepare(loaded.config.data, loaded.lm.model.context, progress=progress)
    with jax.set_mesh(loaded.mesh):
        sharding = NamedSharding(loaded.mesh, loaded.lm.rules.spec(("batch", "time")))
        batches = eval_batches(data.train, batch_size, limit=rows, sharding=sharding)
        return loaded._replace(params=calibrate(loaded.lm, loaded.params, batches))


def depth_curve(
    loaded: Loaded,
    paths: tuple[str, ...] = (),
    *,
    points: int = 9,
    calibration_rows: int = 0,
    **of_rows: Any,
) -> dict[str, Any]:
    """Causal evaluations of one checkpoint at many depths.

    Args:
      paths, of_rows: the text, as in `train.score.score`.
      points: settings of the dial, evenly from 1 to R recursions; a model that cannot be dialled
        has none.
      calibration_rows: see `surveyed`.
    Returns:
      `as_configured`, `dial` (one entry a mean depth, `asked`) and `cap` (one a `max_depth` 1..R,
      under the configured rule), each an `evaluate_at`.
    Raises:
      UserError: a model of one recursion has no depths to compare; else as `score`.
    """
    steps = loaded.lm.program.recursions
    if steps < 2:
        raise UserError(
            f"the model {loaded.config.name!r} applies its core once, so there is no depth to vary; train one with "
            "config.model.recursions of 2 or more (configs/mor.py, configs/recursive.py)."
        )
    if points < 2:
        raise UserError(f"the curve needs at least 2 points, got {points}.")
    loaded = surveyed(loaded, rows=calibration_rows)
    with jax.set_mesh(loaded.mesh):
        batches, token_bytes = held_out(loaded, paths, **of_rows)

        def at(**limits: float) -> dict[str, Any]:
            return evaluate_at(loaded.lm, loaded.params, batches, token_bytes, **limits)

        depths = np.linspace(1, steps, points).round(6).tolist() if loaded.lm.policy.dials else []
        return {
            "recursions": steps,
            "as_configured": at(),
            "dial": [{"asked": depth, **at(mean_depth=depth)} for depth in depths],
            "cap": [{"max_depth": cap, **at(max_depth=cap)} for cap in range(1, steps + 1)],
        }
