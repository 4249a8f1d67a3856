"""The mean-depth dial: from a wish in recursions to the thresholds that fulfil it, and the survey
they are read off."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.data.loader import Batch
from mor_jax.errors import UserError
from mor_jax.model.depth import DepthControl, survey
from mor_jax.model.depth.survey import SURVEY
from mor_jax.model.lm import CAUSAL, LM


def has_survey(params: Any) -> bool:
    """Whether the parameters carry what the dial reads."""
    kept = params["router"].get(SURVEY)
    return kept is not None and bool((np.asarray(kept)[:, 0] > 0).all())


def depth_control(
    lm: LM,
    params: Any,
    rows: int,
    *,
    mean_depth: float | Sequence[float | None] | None = None,
    min_depth: int | Sequence[int | None] | None = None,
    max_depth: int | Sequence[int | None] | None = None,
) -> DepthControl:
    """The control of `rows` sequences: one wish for all of them, or one each; None leaves a thing
    as configured.

    Args:
      mean_depth: recursions a token shall run on average over text like that of training; a routed
        model only.
      min_depth, max_depth: recursions every token runs at least, and at most. A cap cuts what a
        token would have run; a mean depth is reached within them.
    Raises:
      UserError: a wish that cannot be fulfilled, or a checkpoint without a survey (see
        `calibrate`).
    """
    steps = lm.program.recursions
    control = DepthControl.neutral(rows, steps)
    dial = np.array(control.dial_BxR)
    wishes = list(
        zip(*(_each(value, rows) for value in (mean_depth, min_depth, max_depth)), strict=True)
    )
    floors, caps, found = [], [], {}
    for row, (mean, low, high) in enumerate(wishes):
        low, high = 0 if low is None else low, steps if high is None else high
        for name, value, first in (("minimum", low, 0), ("maximum", high, 1)):
            if not first <= value <= steps or value != int(value):
                raise UserError(
                    f"the {name} depth must be a whole number from {first} to {steps}, got {value}."
                )
        if low > high:
            raise UserError(f"the minimum depth {low} is above the maximum depth {high}.")
        floors.append(int(low))
        caps.append(int(high))
        if mean is None:
            continue
        if not math.isfinite(mean):
            raise UserError(f"the mean depth must be a number, got {mean}.")
        wish = (float(mean), floors[-1], caps[-1])
        if wish not in found:
            found[wish] = lm.policy.dial(np.asarray(params["router"].get(SURVEY, ())), *wish)
        dial[row] = found[wish]
    return DepthControl(
        jnp.asarray(dial), jnp.asarray(floors, jnp.int32), jnp.asarray(caps, jnp.int32)
    )


def _each(value: Any, rows: int) -> list[Any]:
    if value is None or isinstance(value, (int, float)):
        return [value] * rows
    if len(value) != rows:
        raise UserError(f"{len(value)} depths were given for {rows} sequences.")
    return list(value)


@functools.partial(jax.jit, static_argnums=0)
def _counts(
    lm: LM, params: Any, tokens_BxT: jax.Array, segment_ids_BxT: jax.Array, control: DepthControl
) -> jax.Array:
    stats = lm.forward(params, tokens_BxT, segment_ids_BxT, mode=CAUSAL, control=control).stats
    assert stats.above is not None, "a routed policy counts"
    return stats.above


def calibrate(lm: LM, params: Any, batches: Iterable[Batch]) -> Any:
    """The parameters with a survey taken from these rows, in place of the one training left (or did
    not leave).

    Under expert-choice one causal pass a recursion step, each under the thresholds the passes
    before have found for the capacities of training; under a policy whose scores all exist before
    the first step, a single one.

    Args:
      batches: tokens and segment_ids [B, T] each; a few ten thousand tokens are enough.
    Raises:
      UserError: a policy without a router; no rows.
    """
    batches = list(batches)
    if SURVEY not in params["router"]:
        raise UserError(
            f"depth policy {lm.depth.policy!r} has no router, so there are no router scores to calibrate."
        )
    if not batches:
        raise UserError("calibration needs at least one batch of rows.")
    steps = lm.program.recursions
    taken = np.zeros((steps, len(survey.PROBES_G)))
    thresholds = np.full((steps,), np.nan, np.float32)
    kept = lm.policy.candidates_kept()
    for r in range(steps):
        total = np.zeros_like(taken)
        for batch in batches:
            rows = batch["tokens"].shape[0]
            control = DepthControl.neutral(rows, steps)
            control = control._replace(
                dial_BxR=jnp.broadcast_to(jnp.asarray(thresholds), (rows, steps))
            )
            total += np.asarray(_counts(lm, params, batch["tokens"], batch["segment_ids"], control))
        if kept is None:
            taken = total
            break
        taken[r] = total[r]
        thresholds[r] = survey.score_reached_by(kept[r], survey.reach(taken[r : r + 1])[0])
    scale = 1 / max(taken[0, 0], 1.0)
    placed = jax.device_put((taken * scale).astype(np.float32), params["router"][SURVEY].sharding)
    return params | {"router": params["router"] | {SURVEY: placed}}
