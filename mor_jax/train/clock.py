"""Time spent stepping, for rates, and what of it a host spends on its own."""

from __future__ import annotations

import time


class Clock:
    """Time spent stepping: evaluation and saving are not in it, nor is the first step, which
    compiles."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._total = 0.0
        self._counted, self._steps, self._first = 0.0, 0, True
        self._input, self._dispatch, self._joined = 0.0, 0.0, 0

    def tick(self) -> None:
        """Counts a finished step."""
        if self._first:
            self._first = False
            self._counted = self.total()
        else:
            self._steps += 1

    def pause(self) -> None:
        self._total += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def total(self) -> float:
        """Seconds so far."""
        return self._total + time.perf_counter() - self._since

    def rate(self) -> float:
        """Steps a second since the last call."""
        elapsed, steps = self.total() - self._counted, self._steps
        self._counted, self._steps = self.total(), 0
        return steps / elapsed if elapsed > 0 else 0.0

    def own(self, input_s: float, dispatch_s: float) -> None:
        """What this host did before it joined a step: reading rows, and handing the step to the
        device."""
        self._input, self._dispatch = self._input + input_s, self._dispatch + dispatch_s
        self._joined += 1

    def pace(self, rate: float) -> dict[str, float]:
        """Seconds a step since the last call, for `goodput.stragglers`: `own_s`, of it `input_s`,
        and `step_s`."""
        steps = max(self._joined, 1)
        found = {
            "own_s": (self._input + self._dispatch) / steps,
            "input_s": self._input / steps,
            "step_s": 1 / rate if rate else 0.0,
        }
        self._input, self._dispatch, self._joined = 0.0, 0.0, 0
        return found
