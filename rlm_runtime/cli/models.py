"""From the command line to language models and the arguments of `RLM`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from rlm_runtime.cli import codes, values
from rlm_runtime.errors import UsageError

# of an endpoint: whoever has set one means that endpoint, and has to name its model
ENDPOINT = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL")


def pair(args: argparse.Namespace) -> tuple[Any, Any]:
    """Root and sub-model; without name, key and URL the model that comes with the package. Raises
    UsageError."""
    from rlm_runtime.lms import NATIVE

    root = args.root or os.environ.get("RLM_ROOT")
    if not root:
        given = args.base_url or args.sub or any(os.environ.get(name) for name in ENDPOINT)
        if given or importlib.util.find_spec("jax") is None:
            raise UsageError(
                "No model: name one with --root openai:MODEL (or anthropic:MODEL), or set RLM_ROOT. "
                "Without any, --root native is a small one that runs here "
                '(pip install ".[jax]" in a checkout).'
            )
        codes.tell(
            "No model is named, so the small one of this package answers (--root native): it finds "
            "values in a text and little else."
        )
        root = NATIVE
    return named(args, root, args.sub or os.environ.get("RLM_SUB"))


def named(args: argparse.Namespace, root: str, sub: str | None) -> tuple[Any, Any]:
    """Root and sub-model of these names. Raises UsageError.

    What the command line says of an endpoint (URL, key, headers, query) is the root's; the
    sub-model shares it only where it is asked at the same endpoint. Entries of the models file
    stand for themselves.
    """
    from rlm_runtime.lms.named import read

    path = args.models or os.environ.get("RLM_MODELS")
    table = read(path) if path else {}
    common = {"window": args.window, "timeout": args.timeout}
    first = _given(
        {"base_url": args.base_url, "price": values.price(args.price), **common}
    ) | values.model_options(args.root_opt, "--root-opt")
    second = _given(
        {
            "base_url": args.sub_base_url,
            "price": values.price(args.sub_price or args.price),
            **common,
        }
    ) | values.model_options(args.sub_opt, "--sub-opt")
    same_name = sub is None or sub == root
    shares = sub is None or (sub not in table and _provider(sub) == _provider(root, table))
    at_root = shares and "base_url" not in second
    _give_key(root, table, first, None if at_root else (sub or root, second))
    if same_name and not (args.sub_base_url or args.sub_opt or args.sub_price):
        lm = _make(root, table, first)
        return lm, lm
    if shares:
        second = {**_endpoint(first, second.get("base_url")), **second}
    return _make(root, table, first), _make(sub or root, table, second)


def _endpoint(options: dict[str, Any], url: str | None) -> dict[str, Any]:
    """What of these options a model asked at `url` (None: at the same endpoint) may share."""
    from rlm_runtime.lms.http import same_origin
    from rlm_runtime.lms.named import OF_ENDPOINT

    if url is not None and not (options.get("base_url") and same_origin(url, options["base_url"])):
        return {}
    return {k: v for k, v in options.items() if k in OF_ENDPOINT}


def _give_key(
    root: str,
    table: dict[str, Any],
    options: dict[str, Any],
    other: tuple[str, dict[str, Any]] | None,
) -> None:
    """The key of the environment belongs to --base-url where no other endpoint can claim it:
    neither the one in the provider's URL variable, nor the provider's own, asked for the `other`
    model."""
    from rlm_runtime.lms import factory_of
    from rlm_runtime.lms.http import same_origin

    url = options.get("base_url")
    if url is None or root in table or "api_key" in options or "api_key_env" in options:
        return
    made = factory_of(root)
    variable, official = (getattr(made, name, None) for name in ("key_variable", "official"))
    if (
        not variable
        or not os.environ.get(variable)
        or os.environ.get(getattr(made, "url_variable", ""))
    ):
        return
    if other is not None and _provider(other[0], table) == _provider(root):
        claimed = other[1].get("base_url") or table.get(other[0], {}).get("base_url") or official
        if claimed and official and same_origin(claimed, official):
            return
    options["api_key_env"] = variable


def _provider(name: str, table: dict[str, Any] | None = None) -> str:
    entry = (table or {}).get(name)
    return (entry.get("model", "") if entry else name).partition(":")[0]


def _make(name: str, table: dict[str, Any], options: dict[str, Any]) -> Any:
    from rlm_runtime.lms import NATIVE, resolve
    from rlm_runtime.lms.named import make

    if name in table:
        return make(name, table[name], **options)
    if table and ":" not in name and name != NATIVE:
        raise UsageError(f"unknown model {name!r}: the models file has {', '.join(table)}.")
    return resolve(name, **options)


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
    if args.prompt_variant is not None:
        options["prompt_variant"] = args.prompt_variant
    environment: dict[str, Any] = {}
    if args.allow_missing:
        environment["policy"] = policy(args.allow_missing)
    if packages := [
        name.strip() for names in args.packages for name in names.split(",") if name.strip()
    ]:
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
    """Where trajectories go: --log, RLM_LOG, or with `default` a folder in the user's state
    directory."""
    named = given or os.environ.get("RLM_LOG")
    if named:
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(
        os.path.expanduser("~"), ".local", "state"
    )
    if not default:
        return None
    folder = Path(state) / "rlm" / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:  # nobody asked for this folder: no reason to refuse the run
        codes.complain(
            f"no trajectory is kept: {folder}: {error.strerror}. Name a folder with --log."
        )
        return None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}
