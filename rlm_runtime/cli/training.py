"""`rlm training make`, `filter` and `pack`: data for models that lead the runtime, and their weights to ship."""

from __future__ import annotations

import argparse

from rlm_runtime.cli import codes, values
from rlm_runtime.errors import UsageError


def run(args: argparse.Namespace) -> int:
    if args.action is None:
        args.parser.print_help()
        return codes.USAGE
    return {"make": make, "filter": filter_, "pack": pack}[args.action](args)


def make(args: argparse.Namespace) -> int:
    from rlm_runtime import training
    from rlm_runtime.tasks import TASKS, parse_length
    from rlm_runtime.training.expert import experts

    tasks = sorted(set(experts()) & set(TASKS)) if args.tasks == "all" else args.tasks.split(",")
    lengths = [parse_length(part) for part in args.lengths.split(",") if part.strip()]
    report = training.make(
        tasks, args.samples, seed=args.seed, split=args.split, out=args.out, lengths=lengths, window=args.window,
        variant=args.prompt_variant, concurrency=args.concurrency, readings_share=args.readings, copies_share=args.copies,
        strategies=[part.strip() for part in args.strategies.split(",") if part.strip()],
    )  # fmt: skip
    codes.tell(str(report))
    if args.tokenizer:
        from rlm_runtime.training.phrases import learn

        codes.tell(f"tokenizer of {learn(args.out, args.tokenizer):,} tokens: {args.tokenizer}")
    print(args.out)
    return codes.OK


def filter_(args: argparse.Namespace) -> int:
    from rlm_runtime import training

    report = training.filter_runs(args.runs, args.out, scores=args.scores, limit=args.limit, subs=args.subs)
    for warning in report.warnings:
        codes.complain(warning)
    for step, count in report.counts.items():
        codes.tell(f"{step:>12} {count:,}")
    print(args.out)
    return codes.OK


def pack(args: argparse.Namespace) -> int:
    import json

    from mor_jax.errors import UserError
    from mor_jax.train.bundle import write_bundle
    from mor_jax.train.checkpoint import load_meta
    from mor_jax.train.load import checkpoint_directory, load_model

    try:
        about = json.loads(values.text(args.provenance, "--provenance")) if args.provenance else {}
    except ValueError as error:
        raise UsageError(f"--provenance {args.provenance}: expected JSON ({error}).") from None
    try:
        loaded = load_model(args.run)
        meta = load_meta(checkpoint_directory(args.run), loaded.step)[1]
        meta = {**meta, "chat_template": loaded.chat_template, "config": loaded.config.to_dict(), "step": loaded.step}
        size = write_bundle(args.out, loaded.params, meta, about)
    except UserError as error:
        raise UsageError(f"{args.run}: {error}") from error
    codes.tell(f"{size:,} bytes, step {loaded.step}")
    print(args.out)
    return codes.OK
