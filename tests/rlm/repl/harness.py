"""Running cells in tests: `play` for a few cells in a REPL of their own, `REPL` inside an event
loop."""

from __future__ import annotations

import asyncio
import os
import textwrap

from rlm_runtime.context import Context
from rlm_runtime.repl import make
from rlm_runtime.repl.base import CellResult, Limits, Outcome, Request

HANG = 60  # seconds after which a test counts as hanging
# no interrupt gets through
HOLD = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass"
QUICK = {"cell_seconds": 1.0, "grace_seconds": 0.5}


async def echo(request: Request) -> list[Outcome]:
    """Answers every call with what it was asked."""
    if request.method == "tool":
        return [
            Outcome(
                value={"tool": request.name, "args": list(request.args), "kwargs": request.kwargs}
            )
        ]
    return [Outcome(value=prompt) for prompt in request.prompts]


async def run(environment, code: str, handler=echo) -> CellResult:
    return await asyncio.wait_for(environment.run(textwrap.dedent(code), handler), HANG)


def play(
    *cells: str, context="some text", handler=echo, kind="local", tools=(), limits=None, **options
):
    """Results of the cells, run one after the other in one REPL."""

    async def go():
        async with make(kind, Limits(**(limits or {})), **options) as environment:
            await environment.start(Context.of(context), tools)
            return [await run(environment, cell, handler) for cell in cells]

    return asyncio.run(go())


def one(cell: str, **options) -> CellResult:
    return play(cell, **options)[0]


def printed(result: CellResult) -> str:
    """stdout of a cell that must have gone well."""
    assert result.status == "ok", result
    return result.stdout


def children() -> set[int]:
    """Processes this process has started and that are still there, dead ones too."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        found = set(file.read().split())
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as file:
                found |= set(file.read().split())
        except OSError:
            pass
    return {int(pid) for pid in found}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def folders(parent: str) -> list[str]:
    """Work folders of this process under a temp folder."""
    return [
        name
        for name in os.listdir(parent)
        if name.startswith("rlm-repl-") and f"-{os.getpid()}-" in name
    ]
