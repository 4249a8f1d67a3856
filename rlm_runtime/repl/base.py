"""What a REPL environment is to the turn loop. The local worker (default), bubblewrap and Docker
are three of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

from pydantic import Field

from rlm_runtime.context import Context
from rlm_runtime.lms.base import Frozen


class Limits(Frozen):
    """Bounds of one worker. Bytes unless the name says otherwise."""

    # wall time of a cell without the time it waits for sub-calls; CPU time likewise
    cell_seconds: float = 120.0
    grace_seconds: float = 2.0  # between the soft interrupt and the kill
    start_seconds: float = 30.0
    memory: int = 2 << 30  # address space on top of what the context needs
    scratch: int = 256 << 20  # all files in the work folder together
    unpacked: int = 4 << 30  # a compressed context on disk, unpacked, beside the work folder
    output_chars: int = 20_000  # of stdout and of stderr handed to the root, head and tail
    # of a cell's output kept in the REPL for the model to look at later
    kept_chars: int = 5_000_000
    frame: int = 64 << 20  # one message from the worker
    requests: int = 100_000  # sub-call requests one cell may make (a batch counts its prompts)


class SandboxReport(Frozen):
    """Which layers are active in this worker, as the worker and the host found them."""

    environment: str  # local | bubblewrap | docker | unconfined
    # "landlock": "active (ABI 7: files, TCP, signals)", "seccomp": "missing: ..."
    layers: dict[str, str]
    # required layers that are not active (non-empty only with an explicit opt-out)
    missing: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for a terminal or a log."""
        return f"{self.environment}: " + ", ".join(f"{k} {v}" for k, v in self.layers.items())


class CellError(Frozen):
    type: str  # "ValueError"
    message: str
    traceback: str = ""  # the cell's own frames, bounded


class Answer(Frozen):
    """The REPL's `answer` after a cell. `content` is JSON."""

    content: Any = None
    ready: bool = False


class CellResult(Frozen):
    status: Literal["ok", "error", "timeout", "killed", "crashed"]
    stdout: str = ""  # cut head-and-tail to Limits.output_chars, with the banner in between
    stderr: str = ""
    stdout_chars: int = 0  # before the cut
    stderr_chars: int = 0
    error: CellError | None = None
    answer: Answer = Answer()
    # names the user code bound -> "list, 12 items"; bounded
    variables: dict[str, str] = Field(default_factory=dict)
    # set when the worker was restarted: one sentence for the model on what is gone
    lost: str | None = None
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    waited_seconds: float = 0.0  # of the wall time, spent waiting for sub-calls


class Request(Frozen):
    """What a cell asks of the host. Arguments are schema-checked by the host before the handler
    sees them."""

    method: Literal["llm", "rlm", "tool"]
    # llm, rlm: one entry a call, each a str or a JSON value (the child's context)
    prompts: tuple[Any, ...] = ()
    batch: bool = False  # llm_batch / rlm_batch rather than a single call
    model: str | None = None  # llm: which of the allowed sub-models
    schema_: dict[str, Any] | None = None  # structured reply
    question: str | None = None  # rlm: the child's question about each prompt
    name: str | None = None  # tool
    args: tuple[Any, ...] = ()  # tool
    kwargs: dict[str, Any] = Field(default_factory=dict)  # tool


class Outcome(Frozen):
    """One call's result. In the REPL an error in a batch is a `CallError` in its place, a lone one
    is raised."""

    value: Any = None  # JSON
    error: str | None = None
    # of the error: budget | auth | timeout | ... (LMError.kind), "tool", "refused"
    kind: str | None = None


# as many outcomes as prompts (1 for a tool); never raises
Handler = Callable[[Request], Awaitable[list[Outcome]]]


class ToolInfo(Frozen):
    """A user tool as the REPL shows it: a function of this name that asks the host, or a plain JSON
    value."""

    name: str
    description: str = ""
    value: Any = None  # with is_value: bound as a variable instead
    is_value: bool = False


class Environment(Protocol):
    """One REPL. `run` calls are serial. Everything coming out of the worker is treated as
    hostile."""

    report: SandboxReport | None  # after start

    async def start(self, context: Context, tools: tuple[ToolInfo, ...] = ()) -> SandboxReport:
        """Start the worker and bind `context`. Raises SandboxError (a required layer missing, no
        start in time)."""
        ...

    async def run(self, code: str, handler: Handler) -> CellResult:
        """Run one cell. Never raises for anything the cell does: a dead worker is restarted, the
        context reloaded, and the result says what was lost. Cancelling the task interrupts the
        cell."""
        ...

    async def bind(self, name: str, value: Any) -> None:
        """Bind a JSON value in the REPL (the compacted `history`, a session's next context
        `context_1`, ...). Bound values are restored after a restart."""
        ...

    async def rebind_context(self, context: Context, name: str = "context") -> None:
        """Load another context under `name` (sessions: context_1, context_2, ...); restored after a
        restart."""
        ...

    async def reset_answer(self) -> None:
        """`answer` is {"content": None, "ready": False} again."""
        ...

    async def aclose(self) -> None:
        """Kill the worker and remove its work folder. Idempotent; safe in any state."""
        ...
