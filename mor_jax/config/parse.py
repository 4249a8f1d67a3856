"""From a nested dict to a `Config`: unknown fields and wrong types refused, naming the nearest
valid field."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from mor_jax.config.config import Config
from mor_jax.config.depth import DepthConfig, depth_hints, own_fields, policy_class
from mor_jax.config.refusals import nearest
from mor_jax.errors import ConfigError
from mor_jax.paths import as_path, reason


def from_dict(raw: Mapping[str, Any]) -> Config:
    """Build a `Config` without the cross-field checks (used for configs read back from a
    checkpoint).

    Fields of another depth policy than the chosen one are left out: an older configuration may hold
    them."""
    config: Config = _build(Config, raw, "config")
    return config


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Names and types of the fields of a group; of depth, those of every policy."""
    return depth_hints() if cls is DepthConfig else typing.get_type_hints(cls)


def _build(cls: type[Any], raw: Mapping[str, Any], where: str) -> Any:
    hints = _hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(_unknown(key, where, hints))
        hint = hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{key} must be a group of fields, got {value!r}.")
            values[key] = _build(hint, value, f"{where}.{key}")
        else:
            values[key] = _coerce(value, hint, f"{where}.{key}")
    if cls is DepthConfig:
        return policy_class(values.get("policy", DepthConfig.policy))(**own_fields(values))
    return cls(**values)


def _unknown(key: str, where: str, hints: Mapping[str, Any]) -> str:
    """Message for a field that does not exist: the nearest valid name, wherever in the tree it
    lives."""
    for group, cls in typing.get_type_hints(Config).items():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and key in _hints(cls):
            return f"{where}.{key} does not exist. Did you mean config.{group}.{key}?"
    near = nearest(key, hints)
    if near:
        return f"{where}.{key} does not exist. Did you mean {where}.{near}?"
    return f"{where}.{key} does not exist. Valid fields of {where}: {', '.join(hints)}."


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check a leaf against its annotation; int is accepted for float, list for tuple, str for a
    1-tuple."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        args = typing.get_args(hint)
        if isinstance(value, str) and args[0] is str:
            value = (value,) if value else ()
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a tuple, got {value!r}.")
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise ConfigError(f"{where} must have {len(args)} entries, got {value!r}.")
        return tuple(
            _coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
            return value
        raise ConfigError(f"{where} must be {hint.__name__}, got {type(value).__name__} {value!r}.")
    raise ConfigError(f"{where}: cannot check {value!r} against {hint}.")


def saved_config(run: str) -> Config:
    """config.json of a run directory, of this machine or an object store. Raises ConfigError: there
    is none."""
    path = as_path(run) / "config.json"
    try:
        return from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"{path} cannot be read: {reason(e) if isinstance(e, OSError) else e}. Give a run directory."
        ) from e
