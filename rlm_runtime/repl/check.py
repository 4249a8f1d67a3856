"""Which layers of the sandbox are active on this machine: `python -m rlm_runtime.repl.check
[ENVIRONMENT]`."""

from __future__ import annotations

import asyncio
import sys

from rlm_runtime.context import Context
from rlm_runtime.errors import RlmError
from rlm_runtime.repl import make
from rlm_runtime.repl.base import SandboxReport


async def check(kind: str = "local") -> SandboxReport:
    """Start a worker, see what it is locked in by, end it. Raises SandboxError for a required layer
    that is missing."""
    environment = make(kind)
    try:
        return await environment.start(Context.of("a trial"))
    finally:
        await environment.aclose()


def main(arguments: list[str]) -> int:
    try:
        report = asyncio.run(check(*arguments[:1]))
    except RlmError as error:
        print(error, file=sys.stderr)
        return 1
    for name, state in report.layers.items():
        print(f"{name:12} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
