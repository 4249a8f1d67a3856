"""The evaluation with the lowest loss: which it was, how long ago, and its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from mor_jax.train.checkpoint import Checkpointer


class Best:
    """Follows the causal loss of a run's evaluations, or that of preferences.

    Attributes:
      step, nll: of the lowest loss so far, the earlier of equal ones.
      since: evaluations after it.

    Args:
      directory: holds a checkpoint of these weights alone, for every command but `launch.train`.
      kept: whether they are kept.
    """

    def __init__(self, directory: epath.Path, kept: bool):
        self._directory, self._kept = directory, kept
        self._checkpoints: Checkpointer | None = None
        self.step, self.nll, self.since = 0, math.inf, 0

    def state(self) -> dict[str, Any] | None:
        """Plain JSON, for a checkpoint; None before the first evaluation."""
        return (
            {"step": self.step, "nll": self.nll, "since": self.since}
            if self.nll < math.inf
            else None
        )

    def go_on_from(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Back to `state`, of a checkpoint of `step`; weights of later steps are removed, they come
        again."""
        known = state or {"step": 0, "nll": math.inf, "since": 0}
        self.step, self.nll, self.since = known["step"], known["nll"], known["since"]
        self.close()
        if self._kept and jax.process_index() == 0 and self._directory.is_dir():
            for found in self._directory.iterdir():
                if found.name.isdigit() and int(found.name) > step:
                    found.rmtree()

    def see(self, step: int, nll: float, params: Any, meta: Mapping[str, Any]) -> None:
        """Take note of an evaluation. Raises CheckpointError: the weights cannot be written."""
        if not nll < self.nll:
            self.since += 1
            return
        self.step, self.nll, self.since = step, nll, 0
        if self._kept:
            self._checkpoints = self._checkpoints or Checkpointer(self._directory, keep=1)
            self._checkpoints.save(step, {"params": params}, {**meta, "step": step})

    def close(self) -> None:
        """Wait until the weights are written."""
        checkpoints, self._checkpoints = self._checkpoints, None
        if checkpoints is not None:
            checkpoints.close()
