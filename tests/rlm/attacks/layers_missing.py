"""Run as a program: a host on whose system a layer of the sandbox cannot be had. Prints what came
of it, as JSON.

The layer is taken away by a filter on the host itself, which its workers inherit: the system calls
of that layer are answered like on a kernel that does not know them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from rlm_runtime.context import Context
from rlm_runtime.errors import SandboxError
from rlm_runtime.repl import make
from rlm_runtime.repl.base import Outcome
from rlm_runtime.repl.sandbox import SandboxPolicy
from rlm_runtime.repl.worker import filter as bpf
from rlm_runtime.repl.worker import kernel

NUMBERS = {"landlock": [444, 445, 446], "seccomp": [317], "limits": [160], "privileges": [126]}


def take_away(layer: str) -> None:
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    code = [(bpf.LOAD, 0, 0, bpf.NUMBER)]
    for number in NUMBERS[layer]:
        code += [(bpf.JEQ, 0, 1, number), (bpf.RETURN, 0, 0, bpf.ERRNO | bpf.ENOSYS)]
    if layer == "limits":  # prlimit64 that sets something; and Python uses it for setrlimit as well
        refuse = [
            (bpf.LOAD, 0, 0, bpf.ARGS + 16),
            (bpf.JEQ, 1, 0, 0),
            (bpf.RETURN, 0, 0, bpf.ERRNO | 1),
        ]
        code += [(bpf.JEQ, 0, len(refuse), 302), *refuse, (bpf.LOAD, 0, 0, bpf.NUMBER)]
    bpf.install([*code, (bpf.RETURN, 0, 0, bpf.ALLOW)])


async def ping(_request):
    return [Outcome(value="ping")]


async def attempt(**policy) -> dict:
    environment = make("local", policy=SandboxPolicy(**policy))
    try:
        report = await environment.start(Context.of("text"))
        result = await environment.run("print(6 * 7, llm_query('x'))", ping)
        return {"said": result.stdout, "missing": report.missing, "line": report.line()}
    except SandboxError as error:
        return {"error": str(error)}
    finally:
        await environment.aclose()


def main(layer: str) -> None:
    take_away(layer)
    others = [name for name in ("landlock", "seccomp", "limits", "privileges") if name != layer]
    print(
        json.dumps(
            {
                "closed": asyncio.run(attempt()),
                "wrong name": asyncio.run(attempt(allow_missing=(others[0],))),
                "opted out": asyncio.run(attempt(allow_missing=(layer,))),
                "user": os.geteuid(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
