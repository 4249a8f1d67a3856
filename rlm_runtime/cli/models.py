"""From the command line to language models and the arguments of `RLM`."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from rlm_runtime.cli import codes, values
from rlm_runtime.errors import UsageError


def pair(args: argparse.Namespace) -> tuple[Any, Any]:
    """Root and sub-model. Raises UsageError."""
    root = args.root or os.environ.get("RLM_ROOT")
    if not root:
        raise UsageError("No model: name one with --root openai:MODEL (or anthropic:MODEL), or set RLM_ROOT.")
    return named(args, root, args.sub or os.environ.get("RLM_SUB"))


def named(args: argparse.Namespace, root: str, sub: str | None) -> tuple[Any, Any]:
    from rlm_runtime.lms import resolve

    common = {"window": args.window, "timeout": args.timeout}
    root_options = {"base_url": args.base_url, "price": values.price(args.price), **common}
    sub_options = {
        "base_url": args.sub_base_url or args.base_url, "price": values.price(args.sub_price or args.price), **common
    }  # fmt: skip
    first = resolve(root, **_given(root_options))
    if (sub is None or sub == root) and _given(sub_options) == _given(root_options):
        return first, first
    return first, resolve(sub or root, **_given(sub_options))


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `RLM`. Raises UsageError."""
    from rlm_runtime.budget import Budget
    from rlm_runtime.repl.base import Limits
    from rlm_runtime.rlm.options import check_model

    budget, limits, options = values.settings(args.set)
    flags = {
        "usd": args.budget_usd,
        "seconds": args.budget_seconds,
        "turns": args.budget_turns,
        "sub_calls": args.budget_calls,
    }
    budget = {**_given(flags), **budget}
    for name in ("system_prompt", "tips"):
        path = getattr(args, name)
        if path is not None:
            options[name] = values.text(path, "--" + name.replace("_", "-"))
    environment: dict[str, Any] = {}
    if args.allow_missing:
        environment["policy"] = policy(args.allow_missing)
    if packages := [name.strip() for names in args.packages for name in names.split(",") if name.strip()]:
        environment["packages"] = tuple(dict.fromkeys(packages))
    return {
        "max_depth": args.max_depth,
        "budget": check_model("budget", Budget, budget),
        "limits": check_model("limits", Limits, limits),
        "environment": args.environment,
        "tools": values.tools(args.tools),
        **({"environment_options": environment} if environment else {}),
        **options,
    }


def policy(allow_missing: list[str]) -> Any:
    """How a worker is confined. Raises UsageError for a layer that is none."""
    from rlm_runtime.repl.sandbox import SandboxPolicy

    return SandboxPolicy(allow_missing=tuple(allow_missing))


def log_folder(given: str | None, *, default: bool) -> Path | None:
    """Where trajectories go: --log, RLM_LOG, or with `default` a folder in the user's state directory."""
    named = given or os.environ.get("RLM_LOG")
    if named:
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    if not default:
        return None
    folder = Path(state) / "rlm" / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:  # nobody asked for this folder: no reason to refuse the run
        codes.complain(f"no trajectory is kept: {folder}: {error.strerror}. Name a folder with --log.")
        return None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}
