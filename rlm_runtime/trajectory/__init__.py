"""The full record of a run: typed events, one JSON object a line, written as they happen.

A run folder holds `events.jsonl` and `blobs/<sha256>` (each in-memory context once, by hash).
Events refer to *nodes* of the call tree: the root is node "0"; the k-th call a node makes (LM call
or child RLM) is "<node>.<k>". The root history is append-only, so a turn records only the messages
it adds and the log stays linear in the run.
"""

from rlm_runtime.trajectory.events import (
    VERSION,
    AnyEvent,
    Asked,
    BudgetNote,
    CellEnd,
    CellStart,
    Compacted,
    ContextLoaded,
    Event,
    NodeEnd,
    NodeStart,
    Nudged,
    Replied,
    RunEnd,
    RunStart,
    SandboxUp,
    parse_event,
)
from rlm_runtime.trajectory.reader import (
    EVENTS,
    Tail,
    Trajectory,
    decode,
    events_file,
    follow,
    lenient,
    read,
)
from rlm_runtime.trajectory.summary import Summary, summary
from rlm_runtime.trajectory.writer import TrajectoryWriter, encode, run_folder, store_blob

__all__ = [
    "EVENTS",
    "VERSION",
    "AnyEvent",
    "Asked",
    "BudgetNote",
    "CellEnd",
    "CellStart",
    "Compacted",
    "ContextLoaded",
    "Event",
    "NodeEnd",
    "NodeStart",
    "Nudged",
    "Replied",
    "RunEnd",
    "RunStart",
    "SandboxUp",
    "Summary",
    "Tail",
    "Trajectory",
    "TrajectoryWriter",
    "decode",
    "encode",
    "events_file",
    "follow",
    "lenient",
    "parse_event",
    "read",
    "run_folder",
    "store_blob",
    "summary",
]
