"""Training progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar


class TrainingBar:
    """Progress over `steps` optimiser steps; silent unless `shown`."""

    def __init__(self, steps: int, *, shown: bool):
        self._console = Console(stderr=True, quiet=not shown, highlight=False)
        self._steps = steps
        self._bar = Bar(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, info="compiling ...")
        self._bar.start()

    def update(self, step: int, values: dict[str, Any]) -> None:
        """After a logged training step."""
        info = f"loss {values['loss']:.3f} · {values['bits_per_byte']:.3f} bits/byte · {values['tokens_per_s']:,.0f} tok/s"
        if values["mfu"] is not None:
            info += f" · MFU {values['mfu']:.1%}"
        self._bar.update(self._task, completed=step, info=info)
        if self._bar.disable:
            eta = (self._steps - step) / max(values["tokens_per_s"] * step / values["tokens"], 1e-9)
            self.say(f"step {step}/{self._steps} · {info} · eta {eta / 60:.1f} min")

    def evaluation(self, step: int, record: dict[str, Any]) -> None:
        """After an evaluation: both losses, the causal one first."""
        line = f"step {step} · held out: {record['causal/bits_per_byte']:.3f} bits/byte causal (NLL {record['causal/nll']:.3f})"
        if "sampling_accuracy" in record:
            line += (
                f", top-k NLL {record['topk/nll']:.3f} · mean depth {record['causal/mean_depth']:.2f}"
                f" · sampling accuracy {record['sampling_accuracy']:.1%} · dead tokens {record['dead_token_ratio']:.1%}"
            )
        if "preference/margin" in record:
            line += (
                f" · chosen preferred in {record['preference/accuracy']:.1%} of pairs, "
                f"margin {record['preference/margin']:.3f}"
            )
        self.say(line)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
