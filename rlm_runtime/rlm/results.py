"""What a completion comes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rlm_runtime.lms.base import Frozen, Usage
from rlm_runtime.repl.base import SandboxReport

ANSWERED, TURNS, CANCELLED, ERROR = "answered", "turns", "cancelled", "error"


def at_limit(limit: str) -> str:
    """The stop reason of a limit of the budget: "budget:usd"."""
    return f"budget:{limit}"


class RLMResult(Frozen):
    """The answer of a completion and what it took.

    `answer` is what the model handed in: any JSON value, or with `output=` a value of that type and
    never one of another type. With `partial` it is the best there was when the run had to stop
    (None: there was nothing, or nothing that fits `output`); `text` then is the same as the model
    wrote it.
    """

    answer: Any = None
    stop_reason: str = ANSWERED  # answered | turns | budget:<field of Budget> | cancelled | error
    partial: bool = False  # the run was stopped before the model said it was ready
    text: str = ""
    error: str | None = None  # what stopped it, or why `answer` is None
    # with stop_reason error: LMError.kind where a model failed, else the error's class
    error_kind: str | None = None
    usage: Usage = Usage()  # of the whole tree
    usage_by_depth: dict[int, Usage] = Field(default_factory=dict)
    turns: int = 0  # of the root
    sub_calls: int = 0  # of the whole tree
    seconds: float = 0.0
    run: str = ""  # id of the run
    trajectory: Path | None = None  # the run's folder; None where it is in memory only (`events`)
    sandbox: SandboxReport | None = None
    notes: tuple[str, ...] = ()  # what the reader should know: an incomplete trajectory, ...
    # the trajectory writer; read it through `events`
    record: Any = Field(None, repr=False, exclude=True)

    @property
    def cost_usd(self) -> float | None:
        """Dollars of the whole tree; None where no price is known."""
        return self.usage.cost_usd

    @property
    def events(self) -> Iterable[Any]:
        """The events of the run, from memory or read back from the file."""
        return () if self.record is None else self.record.events

    def __str__(self) -> str:
        return self.answer if isinstance(self.answer, str) else self.text


@dataclass(frozen=True)
class Ending:
    """How the conversation of one node ended."""

    reason: str
    answer: Any = None
    text: str = ""
    partial: bool = False
    error: str | None = None
    kind: str | None = None  # RLMResult.error_kind
    cause: Exception | None = None  # where nothing can be shown: what `completion` raises
