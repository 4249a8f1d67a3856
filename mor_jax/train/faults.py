"""What happens after a bad step: one that is not finite, or whose loss jumps. Policies: skip,
rewind, stop.

    skip    the step's update is thrown away, the run goes on with the next rows
    rewind back to the last good checkpoint (or the beginning), and on from there with the rows that
            come after the bad ones, as PaLM did (arXiv:2204.02311, section 5.1)
    stop    the run ends with an error; the last good checkpoint is kept

A step that is not finite never changes the state, whatever the policy; nor does a spike, since the
step itself compares its loss with a limit it is given. So no checkpoint ever holds the result of a
bad step.

Everything here is a function of the losses seen, which all hosts see alike, and travels in the
checkpoint: a resumed run judges as the uninterrupted one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mor_jax.config import TrainConfig
from mor_jax.errors import UserError

WINDOW = 64  # steps the median is taken over
ENOUGH = 16  # below so many there is no limit yet
IN_A_ROW = 10  # bad steps after which skipping is no help
REWINDS = 3  # to one and the same checkpoint
OK, SKIP, REWIND = "ok", "skip", "rewind"


class TrainingError(UserError):
    """The run cannot go on; checkpoints already written are good. All hosts raise it at the same
    step."""

    everywhere = True


class Faults:
    """Judge of the steps of one run. `saved`: what `state` gave, from a checkpoint."""

    def __init__(self, cfg: TrainConfig, saved: Mapping[str, Any] | None = None):
        saved = saved or {}
        self._cfg = cfg
        self._losses: list[tuple[int, float]] = [
            (int(s), float(x)) for s, x in saved.get("losses", [])
        ]
        self._rewinds: list[list[int]] = [list(map(int, r)) for r in saved.get("rewinds", [])]
        self._skips: list[int] = list(map(int, saved.get("skips", [])))
        self._in_a_row = int(saved.get("in_a_row", 0))

    def state(self) -> dict[str, Any]:
        """Plain JSON for the checkpoint."""
        return {
            "losses": self._losses,
            "rewinds": self._rewinds,
            "skips": self._skips,
            "in_a_row": self._in_a_row,
        }

    def position(self, step: int) -> int:
        """Number of the batch that step `step` (from 1) trains on: step - 1, plus the batches
        rewinds left out."""
        return step - 1 + sum(bad - good for bad, good in self._rewinds)

    def skipped(self, before: int) -> int:
        """Steps below `before` whose update was thrown away: so many is the optimiser's own count
        behind."""
        return sum(s < before for s in self._skips)

    def limit(self, step: int) -> np.float32:
        """float32: the loss of `step` above which its update is not applied; infinite where there
        is none.

        Of the steps up to `step` - 2: step - 1 may still be running when `step` is dispatched.
        """
        seen = [x for s, x in self._losses if s <= step - 2][-WINDOW:]
        if not self._cfg.spike_threshold or len(seen) < ENOUGH:
            return np.float32(np.inf)
        return np.float32(statistics.median(seen) + self._cfg.spike_threshold)

    def judge(
        self, step: int, values: Mapping[str, float], limit: np.float32, kept: Callable[[], str]
    ) -> tuple[str, str]:
        """(OK | SKIP | REWIND, a sentence about it) for the metrics of a step.

        Args:
          limit: what the step was given.
          kept: says which checkpoint there is; asked only for an error.
        Raises:
          TrainingError: the policy is to stop, or skipping has not helped.
        """
        bad = [k for k in ("loss", "grad_norm", "update_norm") if not math.isfinite(values[k])]
        loss, cfg = np.float32(values["loss"]), self._cfg
        if not bad and loss <= limit:
            self._losses = [*self._losses, (step, float(values["loss"]))][-(WINDOW + 2) :]
            self._in_a_row = 0
            return OK, ""
        if bad:
            policy, field = cfg.on_nonfinite, "on_nonfinite"
            what = f"{bad[0]} is {values[bad[0]]} at step {step}"
            advice = "Lower config.optim.peak_lr, lengthen config.optim.warmup, or look at the rows of that step."
        else:
            policy, field = cfg.on_spike, "on_spike"
            what = f"the loss jumped to {loss:.4g} at step {step}, above the limit of {limit:.4g}"
            advice = "Lower config.optim.peak_lr, or raise config.train.spike_threshold."
        self._in_a_row += 1
        if policy == SKIP and self._in_a_row < IN_A_ROW:
            self._skips.append(step)
            return SKIP, f"{what}; its update was skipped."
        if policy == REWIND:
            return REWIND, f"{what}."
        why = f", the {self._in_a_row}th bad step in a row" if policy == SKIP else ""
        raise TrainingError(
            f"{what}{why}; the run was stopped (config.train.{field} = {policy!r}) and {kept()}. {advice}"
        )

    def rewind(self, bad: int, good: int) -> None:
        """Note that the run goes back from step `bad` to the state after step `good`.

        Raises TrainingError where it went back there too often already.
        """
        if sum(g == good for _, g in self._rewinds) >= REWINDS:
            raise TrainingError(
                f"step {bad} is bad again after {REWINDS} rewinds to step {good}, each with other rows; the run was "
                "stopped. The trouble is not in the data: lower config.optim.peak_lr."
            )
        self._rewinds.append([bad, good])
        self._losses = [(s, x) for s, x in self._losses if s <= good]
        self._skips = [s for s in self._skips if s <= good]
        self._in_a_row = 0
