"""The typed events of a run. Strings may hold anything a model or a cell can produce, lone
surrogates included."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rlm_runtime.lms.base import Message, Usage
from rlm_runtime.repl.base import CellResult

VERSION = 1


class Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    t: float = 0.0  # seconds since the run began; set by the writer
    node: str = "0"


class RunStart(Event):
    type: Literal["run_start"] = "run_start"
    version: int = VERSION
    run: str  # id of the run
    started_at: str  # ISO 8601, UTC
    question: str | None = None
    root: str = ""
    sub: str = ""
    max_depth: int = 1
    budget: dict[str, Any] = Field(default_factory=dict)
    # limits, prompts' version, package version
    settings: dict[str, Any] = Field(default_factory=dict)
    session_turn: int = 0  # how many completions this session had before


class ContextLoaded(Event):
    type: Literal["context"] = "context"
    name: str = "context"
    kind: str  # str | bytes | list | dict | messages | file | folder
    chars: int | None = None
    bytes: int | None = None
    sha256: str | None = None  # of the bytes, None where too large to hash before the run
    blob: str | None = None  # file under blobs/
    path: str | None = None  # a file or folder context, not copied
    preview: str = ""
    # encoding, patterns, names of several files
    reading: dict[str, Any] = Field(default_factory=dict)


class SandboxUp(Event):
    type: Literal["sandbox"] = "sandbox"
    environment: str
    layers: dict[str, str]
    start_seconds: float
    # of this worker; a small window makes them smaller
    limits: dict[str, Any] = Field(default_factory=dict)


class NodeStart(Event):
    """An LM call or a child RLM begins. The root's own model calls are `Replied` events of its
    turns."""

    type: Literal["node_start"] = "node_start"
    parent: str
    kind: Literal["lm", "rlm", "tool"]
    model: str = ""
    depth: int = 0
    turn: int = 0  # of the parent
    cell: int = 0  # of the parent's turn
    prompt: str = ""  # text, or JSON of a value; whole (sub-prompts are the run's data)
    question: str | None = None


class NodeEnd(Event):
    type: Literal["node_end"] = "node_end"
    value: Any = None
    error: str | None = None
    kind: str | None = None
    usage: Usage = Usage()
    seconds: float = 0.0


class Asked(Event):
    """Messages added to a node's history before a model call (system prompt and metadata at turn
    1)."""

    type: Literal["asked"] = "asked"
    turn: int
    messages: tuple[Message, ...]
    # the oldest messages but system prompt and task, that this call was made without
    left_out: int = 0


class Replied(Event):
    type: Literal["replied"] = "replied"
    turn: int
    message: Message  # the part kept in the history
    # the whole reply where it differs (hallucinated output cut off, thinking removed)
    raw: str | None = None
    discarded: int = 0  # characters cut
    usage: Usage = Usage()
    seconds: float = 0.0
    finish_reason: str = "stop"


class CellStart(Event):
    type: Literal["cell_start"] = "cell_start"
    turn: int
    cell: int
    code: str


class CellEnd(Event):
    type: Literal["cell_end"] = "cell_end"
    turn: int
    cell: int
    result: CellResult


class Nudged(Event):
    """The reply could not be used as it was; `reason` is the parser's word for it, `text` what the
    model was told."""

    type: Literal["nudged"] = "nudged"
    turn: int
    reason: str
    text: str


class Compacted(Event):
    type: Literal["compacted"] = "compacted"
    turn: int
    tokens_before: int
    tokens_after: int
    summary: str


class BudgetNote(Event):
    """Snapshot after a turn, and whenever a limit refuses a call (`refused` names it)."""

    type: Literal["budget"] = "budget"
    used: dict[str, float]
    refused: str | None = None


class RunEnd(Event):
    type: Literal["run_end"] = "run_end"
    stop_reason: str  # answered | forced | turns | budget:<limit> | cancelled | error
    answer: Any = None
    error: str | None = None
    usage: Usage = Usage()
    usage_by_depth: dict[str, Usage] = Field(default_factory=dict)
    turns: int = 0
    seconds: float = 0.0


AnyEvent = Annotated[
    RunStart
    | ContextLoaded
    | SandboxUp
    | NodeStart
    | NodeEnd
    | Asked
    | Replied
    | CellStart
    | CellEnd
    | Nudged
    | Compacted
    | BudgetNote
    | RunEnd,
    Field(discriminator="type"),
]


@functools.cache
def event_adapter() -> TypeAdapter[AnyEvent]:
    """Built when a record is first read; a run only writes."""
    return TypeAdapter(AnyEvent)


def parse_event(line: str | bytes) -> AnyEvent:
    """One line of a record. Raises pydantic.ValidationError."""
    return event_adapter().validate_json(line)
