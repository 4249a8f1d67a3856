"""`rlm tasks` and `rlm eval`: long-context tasks, and models measured on them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlm_runtime.cli import codes, models

if TYPE_CHECKING:
    from rlm_runtime.tasks.base import Example


def tasks(args: argparse.Namespace) -> int:
    from rlm_runtime.tasks import TASKS, get, parse_length

    if args.name is None:
        width = max(map(len, TASKS))
        for name, entry in TASKS.items():
            print(f"{name:{width}}  {entry.about}")
        return codes.OK
    task, length = get(args.name), parse_length(args.length)
    if args.out:
        example = task.example(length, seed=args.seed, folder=args.out)
        described = _described(example, str(example.context))
        (Path(args.out) / "example.json").write_text(
            json.dumps(described, indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
        print(example.context)
        return codes.OK
    with tempfile.TemporaryDirectory(prefix="rlm-task-") as folder:
        example = task.example(length, seed=args.seed, folder=folder)
        if example.context.is_dir():
            described = _described(example, "a folder: write it with --out DIR")
        else:
            described = _described(example, example.context.read_text(encoding="utf-8"))
    print(json.dumps(described, ensure_ascii=False))
    return codes.OK


def _described(example: Example, context: str) -> dict[str, Any]:
    return {
        "id": example.id,
        "question": example.question,
        "answer": example.answer,
        "intro": example.intro,
        "context": context,
    }


def eval(args: argparse.Namespace) -> int:
    from rich.console import Console

    from rlm_runtime.tasks import parse_length
    from rlm_runtime.tasks.evaluate import evaluate
    from rlm_runtime.training.reworded import get

    chosen = [get(name) for name in args.task]  # a wrong name shows before a wrong model
    lengths = [parse_length(part) for part in args.lengths.split(",") if part.strip()]
    options = models.run_options(args)
    root, sub = models.pair(args)
    if args.log:
        options["log_dir"] = Path(args.log)
    evaluation = evaluate(
        chosen,
        lengths,
        args.modes.split(","),
        root=root,
        sub=sub,
        samples=args.samples,
        seed=args.seed,
        concurrency=args.concurrency,
        out=args.out,
        rlm=options,
        show=True,
    )
    Console(width=None if sys.stdout.isatty() else 140).print(evaluation.table())
    for file in evaluation.files:
        print(file)
    failed = sum(row.status == "error" for row in evaluation.rows)
    if failed:
        codes.complain(
            f"{failed} of {len(evaluation.rows)} runs failed; the same command tries them again."
        )
    return codes.FAILED if failed else codes.OK
