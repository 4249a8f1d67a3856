"""`rlm training make`, `drill` and `filter`: data for models that lead the runtime."""

from __future__ import annotations

import argparse

from rlm_runtime.cli import codes


def run(args: argparse.Namespace) -> int:
    if args.action is None:
        args.parser.print_help()
        return codes.USAGE
    return {"make": make, "drill": drill, "filter": filter_}[args.action](args)


def make(args: argparse.Namespace) -> int:
    from rlm_runtime import training
    from rlm_runtime.tasks import TASKS, parse_length
    from rlm_runtime.training.expert import experts

    tasks = sorted(set(experts()) & set(TASKS)) if args.tasks == "all" else args.tasks.split(",")
    lengths = [parse_length(part) for part in args.lengths.split(",") if part.strip()]
    report = training.make(
        tasks,
        args.samples,
        seed=args.seed,
        split=args.split,
        out=args.out,
        lengths=lengths,
        window=args.window,
        variant=args.prompt_variant,
        concurrency=args.concurrency,
        readings_share=args.readings,
        copies_share=args.copies,
        strategies=[part.strip() for part in args.strategies.split(",") if part.strip()],
    )
    codes.tell(str(report))
    if args.tokenizer:
        from rlm_runtime.training.phrases import learn

        codes.tell(f"tokenizer of {learn(args.out, args.tokenizer):,} tokens: {args.tokenizer}")
    print(args.out)
    return codes.OK


def drill(args: argparse.Namespace) -> int:
    from rlm_runtime import training

    training.drill(args.samples, seed=args.seed, split=args.split, out=args.out)
    print(args.out)
    return codes.OK


def filter_(args: argparse.Namespace) -> int:
    from rlm_runtime import training

    report = training.filter_runs(
        args.runs, args.out, scores=args.scores, limit=args.limit, subs=args.subs
    )
    for warning in report.warnings:
        codes.complain(warning)
    for step, count in report.counts.items():
        codes.tell(f"{step:>12} {count:,}")
    print(args.out)
    return codes.OK
