"""The console command `rlm`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from rlm_runtime.cli import codes
from rlm_runtime.cli.arguments import parsed, parser
from rlm_runtime.errors import RlmError, UsageError

# Loaded when asked for: `rlm --help` must not wait for what it does not need.
COMMANDS = {
    "ask": "ask",
    "serve": "serving",
    "view": "viewing",
    "replay": "viewing",
    "eval": "evaluating",
    "tasks": "evaluating",
    "sandbox": "sandbox",
    "training": "training",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `codes`)."""
    top = parser()
    args = parsed(top, argv)
    if args.version:
        print(_version())
        return codes.OK
    if args.command is None:
        top.print_help(sys.stderr)
        return codes.USAGE
    try:
        return _run(args)
    except KeyboardInterrupt:
        return codes.CANCELLED
    except BrokenPipeError:  # whoever read our output has seen enough
        return codes.OK
    except RlmError as error:
        if isinstance(error, UsageError):
            codes.tell(args.parser.format_usage().rstrip())
        codes.complain(" ".join([str(error), *getattr(error, "__notes__", ())]))
        return codes.code_of(error)
    except Exception as error:
        if os.environ.get("RLM_DEBUG"):
            traceback.print_exc()
        notes = " ".join(getattr(error, "__notes__", ()))
        codes.complain(
            f"unexpected {type(error).__name__}: {error}. {notes} (RLM_DEBUG=1 shows where.)"
        )
        return codes.FAILED
    finally:
        _flush()


def _flush() -> None:
    """A reader that has gone away must not change the exit code when Python flushes at its end."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _run(args: argparse.Namespace) -> int:
    module = importlib.import_module(f"rlm_runtime.cli.{COMMANDS[args.command]}")
    name = args.command if module.__name__.endswith(("viewing", "evaluating")) else "run"
    code: int = getattr(module, name)(args)
    return code


def _version() -> str:
    try:
        return metadata.version("mor-jax")
    except metadata.PackageNotFoundError:
        return "unknown"
