"""`rlm ask`: one question about one context; the answer alone goes to standard output."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rlm_runtime import live
from rlm_runtime.cli import codes, contexts, models, values
from rlm_runtime.errors import RlmError, UsageError
from rlm_runtime.terminal import clean


def run(args: argparse.Namespace) -> int:
    from rlm_runtime.context import Context

    if not args.question.strip():
        raise UsageError("The question is empty.")
    options = models.run_options(args)
    schema = values.schema(args.output_schema)
    root, sub = models.pair(args)
    log_dir = None if args.no_log else models.log_folder(args.log, default=True)
    with contexts.opened(args.context) as source:
        context = Context.of(
            source[0] if len(source) == 1 else source,
            encoding=args.encoding,
            include=args.include,
            exclude=args.exclude,
            gitignore=not args.no_gitignore,
        )
        if contexts.is_piped(args.context):
            context = dataclasses.replace(context, keep=context.kind == "file")
        return asyncio.run(_ask(args, root, sub, context, schema, log_dir, options))


async def _ask(
    args: argparse.Namespace,
    root: Any,
    sub: Any,
    context: Any,
    schema: Any,
    log_dir: Path | None,
    options: dict[str, Any],
) -> int:
    from rlm_runtime.rlm import RLM

    loop = asyncio.get_running_loop()
    screen = live.viewer(plain=args.plain, quiet=args.quiet)
    running: list[Any] = []

    def stop() -> None:
        """The first signal ends the run, which gives what it has; the second ends the process."""
        if not running or running[0] is None:
            if screen is not None:
                screen.__exit__()  # a terminal without a cursor would stay behind
            os._exit(codes.CANCELLED)  # workers see their channel close, and end
        (screen.say if screen is not None else codes.tell)(
            "rlm: cancelling; once more to end at once"
        )
        running[0].cancel()
        running[0] = None

    try:
        rlm = RLM(root, sub, log_dir=log_dir, on_event=screen, **options)
        for note in context.notes:
            codes.complain(note)
        with screen or contextlib.nullcontext():
            run = rlm.start(context, args.question, output=schema)
            running.append(run)
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop)
            result = await run.result()
    except RlmError as error:
        partial = getattr(error, "result", None)
        if partial is not None and partial.trajectory is not None:
            error.add_note(f"Trajectory: {partial.trajectory}")
        raise
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        for lm in {id(m): m for m in (root, sub)}.values():
            await lm.aclose()
    return tell(args, result, len(context.notes))


def tell(args: argparse.Namespace, result: Any, shown: int = 0) -> int:
    """Print a result, without the first `shown` notes; the exit code it means."""
    answer = (
        result.answer.model_dump(mode="json")
        if hasattr(result.answer, "model_dump")
        else result.answer
    )
    if args.json:
        whole = {
            "answer": answer,
            "stop_reason": result.stop_reason,
            "partial": result.partial,
            "error": result.error,
            "turns": result.turns,
            "sub_calls": result.sub_calls,
            "usage": result.usage.model_dump(),
            "usage_by_depth": {str(d): u.model_dump() for d, u in result.usage_by_depth.items()},
            "cost_usd": result.cost_usd,
            "seconds": result.seconds,
            "run": result.run,
            "trajectory": str(result.trajectory) if result.trajectory else None,
            "notes": list(result.notes),
        }
        out(json.dumps(whole, ensure_ascii=False))
    elif answer is not None:
        text = (
            answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, indent=2)
        )
        out(clean(text) if sys.stdout.isatty() else text)
    code = code_of(result)
    if code != codes.OK:
        what = "no answer" if answer is None else "the answer is partial"
        codes.complain(f"{what} ({result.stop_reason}): {result.error or 'a limit was reached'}")
    for note in result.notes[shown:]:
        codes.complain(note)
    if not args.quiet:
        usage = result.usage
        cost = (
            f" · ${result.cost_usd:.4f}"
            if result.cost_usd is not None
            else " · cost unknown (--price IN,OUT)"
        )
        line = (
            f"{result.turns} turns · {result.sub_calls} sub-calls · {live.short(usage.input_tokens)} in, "
            f"{live.short(usage.output_tokens)} out{cost} · {result.seconds:.1f} s"
        )
        codes.tell(line + (f" · rlm view {result.trajectory}" if result.trajectory else ""))
    return code


def code_of(result: Any) -> int:
    if result.stop_reason == "answered":
        return codes.OK
    if result.stop_reason == "cancelled":
        return codes.CANCELLED
    if result.stop_reason == "error":  # the class of the error, or the kind of an LMError
        return {None: codes.FAILED, "SandboxError": codes.SANDBOX, "RlmError": codes.FAILED}.get(
            result.error_kind, codes.ENDPOINT
        )
    return codes.PARTIAL


def out(text: str) -> None:
    data = (text if text.endswith("\n") else text + "\n").encode("utf-8", "replace")
    with contextlib.suppress(BrokenPipeError):  # whoever read it has seen enough
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
