"""`rlm sandbox`: what contains a model's code on this machine, found out by starting a worker."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from rlm_runtime.cli import codes, models


def run(args: argparse.Namespace) -> int:
    from rlm_runtime.repl.sandbox import LAYERS

    models.policy(args.allow_missing)  # a wrong name is an error before anything is tried
    report, refused = asyncio.run(_try(args.environment, args.allow_missing))
    if args.json:
        print(json.dumps({**report.model_dump(mode="json"), "complete": not report.missing}))
    else:
        width = max(map(len, report.layers), default=0)
        for name, state in report.layers.items():
            print(
                f"{name:{width}}  {codes.one_line(state)}"
                + (f"   ({LAYERS[name]})" if name in LAYERS else "")
            )
    if report.missing:
        names = " ".join(f"--allow-missing {name}" for name in report.missing)
        codes.complain(
            f"{args.environment}: {', '.join(report.missing)} missing"
            + ("; runs are refused." if refused else ", as allowed.")
            + (f" To go without on purpose: {names}." if refused else "")
        )
    return codes.SANDBOX if refused else codes.OK


async def _try(kind: str, allow_missing: list[str]) -> tuple[Any, bool]:
    """The report of a worker, and whether a run would be refused. Raises SandboxError where none
    starts at all."""
    from rlm_runtime.context import Context
    from rlm_runtime.repl import make
    from rlm_runtime.repl.sandbox import LAYERS, SandboxPolicy

    # Every layer may be missing here, so that the report shows them all; the verdict is ours.
    environment = make(kind, policy=SandboxPolicy(allow_missing=tuple(LAYERS)))
    try:
        report = await environment.start(Context.of("try"))
    finally:
        await environment.aclose()
    return report, any(name not in allow_missing for name in report.missing)
