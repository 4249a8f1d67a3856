"""`rlm view` and `rlm replay`: looking at a run again."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rlm_runtime.cli import codes, models
from rlm_runtime.errors import UsageError

SHOWN = 20  # differences of a replay that are printed


def view(args: argparse.Namespace) -> int:
    from rlm_runtime import viewer

    path = Path(args.path) if args.path else models.log_folder(None, default=True)
    if path is None or not path.exists() or (not args.path and not any(path.iterdir())):
        hint = "" if args.path else " No run has been kept yet; rlm ask keeps one."
        raise UsageError(f"There is nothing at {path or 'the default folder'}.{hint}")
    if args.export:
        print(viewer.export(path, args.export))
        return codes.OK
    browser = not args.no_browser and bool(os.environ.get("DISPLAY") or sys.platform == "darwin")

    def announce(url: str) -> None:
        codes.complain(f"{path} at {url} (Ctrl-C ends)")

    viewer.serve(path, host=args.host, port=args.port, open_browser=browser, announce=announce)
    return codes.OK


def replay(args: argparse.Namespace) -> int:
    from rlm_runtime.cli import values
    from rlm_runtime.errors import UsageError
    from rlm_runtime.repl.base import Limits
    from rlm_runtime.replay import replay as run_again
    from rlm_runtime.rlm.options import check_model

    def on_cell(cell: Any, same: bool) -> None:
        if not same and not args.json:
            codes.complain(f"node {cell.node}, turn {cell.turn}, cell {cell.cell} differs")

    budget, limits, options = values.settings(args.set)
    if budget or options:
        raise UsageError(
            f"--set {next(iter(budget or options))}: a replay has only the limits of a REPL."
        )
    report = run_again(
        args.path,
        context=args.context,
        ignore=args.ignore,
        environment=args.environment,
        limits=check_model("limits", Limits, limits),
        on_cell=on_cell,
    )
    if args.json:
        print(report.model_dump_json())
        return codes.OK if report.ok else codes.FAILED
    for difference in report.differences[:SHOWN]:
        print(codes.one_line(difference.line()))
    if len(report.differences) > SHOWN:
        print(f"... and {len(report.differences) - SHOWN} more")
    for warning in report.warnings:
        codes.complain(warning)
    print(report.line())
    return codes.OK if report.ok else codes.FAILED
