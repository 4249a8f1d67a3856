"""Schemas that come from a cell. A cell is hostile: no schema of its may keep the host busy.

Holding a value to a JSON schema can take exponential time, by regular expressions that backtrack
and by references that double at every step. Such schemas are refused; what is left costs time
linear in schema and value.
"""

from __future__ import annotations

import json
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.structured import Shape

LONGEST = 50_000  # characters
# subschemas, and one for eight keys or items of them, each counted as often as it is referred to
EXPANDED = 5_000
# whose keys are names, not keywords
NAMES = ("properties", "$defs", "definitions", "dependentSchemas")
DATA = ("enum", "const", "default", "examples", "required", "dependentRequired")
REFUSED = (
    "pattern",
    "patternProperties",
    "$dynamicRef",
    "$recursiveRef",
    "$id",
    "$anchor",
    "$dynamicAnchor",
)


def shape_of(schema: dict[str, Any]) -> Shape:
    """Raises UsageError for what is no schema, or none that a cell may use."""
    if len(json.dumps(schema)) > LONGEST:
        raise UsageError(f"schema: longer than {LONGEST:,} characters.")
    _weigh(schema, schema, (), [EXPANDED])
    return Shape.of(schema)


def _weigh(node: Any, root: dict[str, Any], open_refs: tuple[str, ...], left: list[int]) -> None:
    if not isinstance(node, list | dict):
        return
    left[0] -= 1 + len(node) // 8
    if left[0] < 0 or len(open_refs) > 50:
        raise UsageError("schema: too many subschemas; make it flatter.")
    if isinstance(node, list):
        for item in node:
            _weigh(item, root, open_refs, left)
        return
    for key, value in node.items():
        if key in REFUSED:
            raise UsageError(
                f"schema: {key!r} is not supported in sub-calls; check the value in Python instead."
            )
        if key == "$ref":
            if value in open_refs:
                raise UsageError(
                    f"schema: {value!r} refers to itself; recursive schemas are not supported in sub-calls."
                )
            left[0] -= len(value) // 64 if isinstance(value, str) else 0
            _weigh(_resolve(value, root), root, (*open_refs, value), left)
        elif key in ("$defs", "definitions"):
            continue  # counted where they are referred to
        elif key in NAMES and isinstance(value, dict):
            _weigh(list(value.values()), root, open_refs, left)
        elif key not in DATA:
            _weigh(value, root, open_refs, left)


def _resolve(ref: Any, root: dict[str, Any]) -> Any:
    node: Any = root
    if not isinstance(ref, str) or not ref.startswith("#"):
        raise UsageError(
            f"schema: only references inside it (#/$defs/...) are followed, not {ref!r}."
        )
    for step in filter(None, ref[1:].split("/")):
        node = (
            node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, dict) else None
        )
    if not isinstance(node, dict):
        raise UsageError(f"schema: {ref!r} refers to nothing in it.")
    return node
