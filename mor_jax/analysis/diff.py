"""Configurations side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mor_jax.analysis import units


@dataclass(frozen=True)
class Field:
    """One field of every configuration; `differs` when not all agree."""

    name: str  # dotted: "model.recursions"
    cells: tuple[str, ...]
    differs: bool


def side_by_side(configs: Sequence[Mapping[str, Any]]) -> list[Field]:
    """All fields of all configurations, in the order they first appear; a dash where one has no
    such field."""
    flat = [_flatten(config) for config in configs]
    names = list(dict.fromkeys(name for config in flat for name in config))
    rows = [tuple(config.get(name, units.NONE) for config in flat) for name in names]
    return [
        Field(name, cells, len(set(cells)) > 1) for name, cells in zip(names, rows, strict=True)
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) and value else json.dumps(value)
    return found
