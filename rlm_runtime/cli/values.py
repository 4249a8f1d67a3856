"""Values as people type them: 8k, 4GiB, turns=50, a price, a Python file with tools."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlm_runtime.errors import UsageError

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
OPTIONS = ("concurrency", "compact_at", "window", "max_repls", "sub_rounds", "schema_retries")


def number(text: str) -> int | float:
    """3, 0.5, 8k, 10M, 2GiB. Raises ValueError."""
    match = re.fullmatch(
        r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(k|m|g|kib|mib|gib|)b?",
        text.strip().lower().replace("_", ""),
    )
    if not match:
        raise ValueError(f"{text!r} is not a number such as 3, 0.5, 8k, 10M or 2GiB")
    value = float(match[1]) * UNITS[match[2]]
    return int(value) if value == int(value) else value


def settings(pairs: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`--set name=value` sorted into fields of Budget, fields of Limits, and arguments of RLM.
    Raises UsageError."""
    from rlm_runtime.budget import Budget
    from rlm_runtime.repl.base import Limits

    groups: list[tuple[Any, dict[str, Any]]] = [
        (Budget.model_fields, {}),
        (Limits.model_fields, {}),
        (OPTIONS, {}),
    ]
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        target = next((found for names, found in groups if name in names), None)
        if not equals or target is None:
            known = sorted(n for names, _ in groups for n in names)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near and equals else ""
            raise UsageError(
                f"--set {pair}: expected NAME=VALUE with a known name.{hint} Known: {', '.join(known)}."
            )
        try:
            target[name] = None if text.strip().lower() == "none" else number(text)
        except ValueError as error:
            raise UsageError(f"--set {name}: {error}, or none.") from None
    return groups[0][1], groups[1][1], groups[2][1]


TEXTS = ("api_key", "api_key_env", "base_url", "reasoning_effort", "provider")
MAPPINGS = ("headers", "query", "extra_body")


def model_options(pairs: Iterable[str], flag: str) -> dict[str, Any]:
    """`--root-opt name=value` as keyword arguments of a model. Raises UsageError, which never shows
    a value."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name, dot, key = name.strip().partition(".")
        name = name.replace("-", "_")
        if not (equals and name) or (dot and not (key and name in MAPPINGS)):
            mappings = ", ".join(f"{m}.NAME" for m in MAPPINGS)
            raise UsageError(
                f"{flag} {pair.partition('=')[0]}: expected NAME=VALUE; with a dot only {mappings}."
            )
        if dot:
            value = _plain_value(text) if name == "extra_body" else text
            found[name] = {**found.get(name, {}), key: value}
        elif name == "price":
            found[name] = price(text)
        elif name in MAPPINGS:
            value = _plain_value(text)
            if not isinstance(value, dict):
                raise UsageError(f"{flag} {name}: expected a JSON object, or {name}.NAME=VALUE.")
            found[name] = {**found.get(name, {}), **value}
        else:
            found[name] = text if name in TEXTS else _plain_value(text)
    return found


def _plain_value(text: str) -> Any:
    """JSON where it is, else a number such as 8k, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return number(text)
    except ValueError:
        return None if text.strip().lower() == "none" else text


def price(text: str | None) -> tuple[float, ...] | None:
    """IN,OUT or IN,OUT,CACHED: dollars a million tokens. Raises UsageError."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
        if len(values) not in (2, 3) or any(not 0 <= v < 1e6 for v in values):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--price {text}: expected IN,OUT in dollars a million tokens, such as 0.25,2."
        ) from None
    return values


def text(path: str, option: str) -> str:
    """The text of a file that an option names. Raises UsageError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: {getattr(error, 'strerror', None) or error}.") from None


def schema(path: str | None) -> dict[str, Any] | None:
    """A JSON schema from a file. Raises UsageError."""
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--output-schema {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"--output-schema {path} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UsageError(
            f"--output-schema {path}: expected a JSON schema, an object; found {type(found).__name__}."
        )
    return found


def tools(paths: Sequence[str]) -> list[Callable[..., Any]]:
    """The public functions that Python files define. The files run in this process. Raises
    UsageError."""
    found: list[Callable[..., Any]] = []
    for index, path in enumerate(paths):
        name = f"rlm_tools_{index}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise UsageError(f"--tools {path}: expected a Python file (.py) that is there.")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UsageError(
                f"--tools {path} cannot be loaded: {type(error).__name__}: {error}."
            ) from error
        mine = [
            f
            for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == name and not n.startswith("_")
        ]
        if not mine:
            raise UsageError(
                f"--tools {path} defines no function whose name does not begin with an underscore."
            )
        found += mine
    return found
