"""Answers of a given form: what the form is, whether a value has it, and what to tell a model whose
value has not."""

from __future__ import annotations

import inspect
import json
import re
import reprlib
import threading
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, lru_cache
from itertools import islice
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.replies import model_json
from rlm_runtime.replies.thinking import clean

SHOWN = 200  # characters of a wrong value in a message
MESSAGES = 3  # errors told at once
TOLD_ONE_BY_ONE = 1_000  # errors of a value; each costs a description
SCHEMA_CHARS = 100_000


class Shape:
    """A JSON schema with, for Python types, the type that values are turned into.

    `Shape.of` takes a pydantic model class, any type pydantic understands (int, list[str], a
    dataclass, a TypedDict, Literal[...]), or a JSON schema as a dict. Methods that judge return
    (value, None) or (None, problem), where the problem is for the model: short, and naming the
    field.
    """

    def __init__(self, schema: dict[str, Any], check: Callable[[Any], tuple[Any, list[str]]]):
        self.schema = schema
        self._check = check

    @classmethod
    def of(cls, form: Any) -> Shape:
        """Raises UsageError for what is neither a type nor a JSON schema."""
        if isinstance(form, Shape):
            return form
        if isinstance(form, Mapping):
            schema = _plain(form)
            return cls(schema, _schema_check(schema))
        return cls(*_type_check(form))

    def check(self, value: Any) -> tuple[Any, str | None]:
        """Hold a JSON value to the shape. A text of JSON is read as JSON and a number in a text as
        a number, but only where the value as it is does not fit."""
        told: list[str] = []
        try:
            _work.begin(value)
            for candidate, telling in self._readings(value):
                found, problems = self._check(candidate)
                if not problems:
                    return found, None
                if telling or not told:
                    told = problems
        except TooMuch:
            return None, TOO_LONG
        except (TypeError, ValueError, RecursionError):
            return None, f"{_shown(value)} is no JSON value"
        more = f"; and {len(told) - MESSAGES} more" if len(told) > MESSAGES else ""
        return None, "; ".join(told[:MESSAGES]) + more

    def parse(self, text: str) -> tuple[Any, str | None]:
        """The value in a model's reply: JSON alone or among words, in a fence, or the bare text."""
        text = clean(text).text
        whole = model_json.loads(text) if text.lstrip()[:1] == '"' else None
        if whole is not None and isinstance(whole[0], str):
            found, problem = self.check(whole[0])
            if problem is None:
                return found, None
        return self.check(text)

    def read(self, found: Any) -> tuple[Any, str | None]:
        """An answer that may be a value or a reply's text of one."""
        return self.parse(found) if isinstance(found, str) else self.check(found)

    def describe(self) -> str:
        """The form, for a model that is to reply with JSON."""
        return f"JSON schema of the answer: {self._shown}"

    def complaint(self, problem: str) -> str:
        """What a model is told whose value did not fit."""
        return (
            f"This does not fit the JSON schema that was asked for: {problem}. "
            f"Give the corrected value in full.\nThe schema: {self._shown}"
        )

    @cached_property
    def _shown(self) -> str:
        return json.dumps(self.schema, ensure_ascii=False)

    def _readings(self, value: Any) -> Iterator[tuple[Any, bool]]:
        """What the value may mean, as it is first; True with the one whose problems say most."""
        yield value, False
        if isinstance(value, str):
            parsed = _work.json_in(value)
            if parsed is not None:
                yield parsed[0], True
                yield _loosened(parsed[0], self.schema, self.schema), True
            value = LEAD.sub("", value.strip()).strip(" \t\n`*\"'").removesuffix(".")
            yield value, False
        yield _loosened(value, self.schema, self.schema), not isinstance(value, str)


# -- bounds ----------------------------------------------------------------------------------------
# for one value, besides two for each of its characters: a keyword applied, a place looked at
STEPS = 4_000
TOO_LONG = "it takes too long to check against this schema; make either simpler"


class TooMuch(Exception):
    """A value costs more steps than it may."""


class _Work(threading.local):
    """The steps left for the value that this thread judges, and the JSON found in its texts so
    far."""

    left = STEPS

    def begin(self, value: Any) -> None:
        """Raises TypeError, ValueError, RecursionError for what is no JSON value."""
        chars = len(value) if isinstance(value, str) else len(json.dumps(value, allow_nan=False))
        self.left = STEPS + 2 * chars
        self._effort = model_json.Effort.for_json(chars)
        self._found: dict[str, tuple[Any] | None] = {}

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise TooMuch

    def json_in(self, text: str) -> tuple[Any] | None:
        """`model_json.in_reply`, once for each text: references may lead to the same one a thousand
        times."""
        self.spend(1)
        if text not in self._found:
            self._found[text] = model_json.in_reply(text, self._effort)
        return self._found[text]


_work = _Work()

LEAD = re.compile(r"(?:the )?(?:final )?(?:answer|result)(?: is)?[ *]*+[:=]?[ ]*+", re.I)


# -- types -----------------------------------------------------------------------------------------
def _type_check(form: Any) -> tuple[dict[str, Any], Callable[[Any], tuple[Any, list[str]]]]:
    from pydantic import (
        PydanticSchemaGenerationError,
        PydanticUserError,
        TypeAdapter,
        ValidationError,
    )

    if (
        isinstance(form, str | bytes | int | float | list | tuple | set)
        or form is None
        or inspect.isroutine(form)
    ):
        raise UsageError(
            f"output: expected a type, a pydantic model class or a JSON schema dict, got {_shown(form)}."
        )
    try:
        adapter = TypeAdapter(form)
        schema = adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError, NameError) as e:
        reason = str(e).split("\n")[0]
        raise UsageError(
            f"output: {_shown(form)} is no type that answers can have: {reason}"
        ) from e

    def check(value: Any) -> tuple[Any, list[str]]:
        try:
            # As JSON: dates come as texts, tuples as lists; but "3" is no int, and 1 no bool,
            # unless loosened on purpose.
            return adapter.validate_json(json.dumps(value, allow_nan=False), strict=True), []
        except ValidationError as e:
            if e.error_count() > TOLD_ONE_BY_ONE:
                return None, [
                    f"{e.error_count():,} places in it do not have the type that is wanted there"
                ]
            return None, [_pydantic_problem(error) for error in e.errors(include_url=False)]
        except (TypeError, ValueError, RecursionError):
            return None, [f"{_shown(value)} is no JSON value"]

    return schema, check


def _pydantic_problem(error: Mapping[str, Any]) -> str:
    where = _path(error["loc"])
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "extra_forbidden":
        return f"{where} is not a field of it"
    message = str(error["msg"]).removeprefix("Input should be").removeprefix("Value error,").strip()
    expected = f"expected {message}" if str(error["msg"]).startswith("Input should be") else message
    return f"{where}: {expected}, got {_shown(error['input'])}"


# -- JSON schemas ----------------------------------------------------------------------------------
def _plain(form: Mapping[str, Any]) -> dict[str, Any]:
    try:
        schema: dict[str, Any] = json.loads(json.dumps(dict(form)))
    except (TypeError, ValueError, RecursionError) as e:
        raise UsageError(f"output: a JSON schema holds JSON values only: {e}.") from e
    if set(schema) == {"name", "schema"} or (
        "json_schema" in schema and schema.get("type") == "json_schema"
    ):
        # as chat endpoints wrap it
        schema = schema.get("json_schema", schema).get("schema", schema)
    return schema


def _schema_check(schema: dict[str, Any]) -> Callable[[Any], tuple[Any, list[str]]]:
    text = json.dumps(schema)
    if len(text) > SCHEMA_CHARS:
        raise UsageError(
            f"output: the JSON schema has {len(text):,} characters; at most {SCHEMA_CHARS:,} are taken."
        )
    return _compiled(text) if schema else lambda value: (value, [])


@lru_cache(256)  # a cell may pass the same schema with a hundred thousand calls
def _compiled(schema_text: str) -> Callable[[Any], tuple[Any, list[str]]]:
    """Schemas also come from cells, so nothing is fetched, patterns run in linear time and all work
    is bounded."""
    import jsonschema
    import referencing
    import referencing.exceptions

    schema = json.loads(schema_text)
    draft = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        draft.check_schema(schema)
    except jsonschema.SchemaError as e:
        where = _path(e.absolute_path, root="the schema")
        raise UsageError(f"output: this is no JSON schema: {where}: {e.message[:300]}.") from e
    except RecursionError as e:
        raise UsageError("output: the JSON schema is nested too deeply.") from e
    if not _KEYWORDS & set(schema):
        raise UsageError(
            f"output: there is no JSON schema keyword in {_shown(schema)}, so every value would fit it. "
            'Write e.g. {"type": "object", "properties": {...}, "required": [...]}.'
        )
    _refuse(schema)
    validator = _bounded(draft)(schema, registry=referencing.Registry())

    def check(value: Any) -> tuple[Any, list[str]]:
        try:
            errors = sorted(
                islice(validator.iter_errors(value), 100),
                key=lambda e: [str(p) for p in e.absolute_path],
            )
        except (TypeError, ValueError):
            return None, [f"{_shown(value)} is no JSON value"]
        except RecursionError:
            return None, ["it is nested too deeply"]
        return (None, [_schema_problem(e) for e in errors]) if errors else (value, [])

    _work.left = 10 * STEPS
    try:
        for reference in ["#", *_found(schema, "$ref")]:
            validator.evolve(schema={"$ref": reference}).is_valid(None)
    except referencing.exceptions.Unresolvable as e:
        raise UsageError(
            f"output: the schema refers to {'#' + e.ref.removeprefix('#')!r}, which is not in it."
        ) from e
    except (RecursionError, TooMuch) as e:
        raise UsageError(
            f"output: the schema's reference {reference!r} leads back to itself."
        ) from e
    return check


WALKING = (
    "additionalProperties",
    "propertyNames",
    "uniqueItems",
    "const",
    "enum",
    "items",
    "contains",
)


@cache
def _bounded(draft: Any) -> Any:
    """The draft's validator with every keyword counted, and linear-time versions of those that are
    not."""
    import jsonschema

    keywords = {**draft.VALIDATORS, "pattern": _pattern, "uniqueItems": _unique_items}
    return jsonschema.validators.extend(
        draft, {name: _counted(name, f) for name, f in keywords.items()}
    )


def _counted(name: str, keyword: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
    """`keyword` with its steps counted: what it walks over in schema and value, and the text of its
    errors."""
    base = 8 if name == "$ref" else 1

    def counted(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
        walked = len(wanted) if isinstance(wanted, list | dict) else 0
        if name in WALKING and isinstance(instance, list | dict):
            walked += len(instance)
        _work.spend(base + (walked if name == "enum" else walked // 8))
        for error in keyword(validator, wanted, instance, schema) or ():
            _work.spend(1 + len(error.message) // 64)
            yield error

    return counted


@lru_cache(1024)
def _regex(pattern: str) -> Any:
    """pydantic's regular expressions take linear time whatever the pattern; look-around is not in
    them."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError as e:
        raise UsageError(
            f"output: the pattern {_shown(pattern)} cannot be used (look-around is not supported)."
        ) from e


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    import jsonschema

    if validator.is_type(instance, "string") and not _regex(pattern).isinstance_python(instance):
        yield jsonschema.ValidationError(
            f"does not match {_shown(pattern)}, got {_shown(instance)}"
        )


def _unique_items(validator: Any, wanted: bool, instance: Any, schema: Any) -> Iterator[Any]:
    import jsonschema

    if wanted and validator.is_type(instance, "array"):
        texts = [json.dumps(item, sort_keys=True) for item in instance]
        if len(set(texts)) < len(texts):
            yield jsonschema.ValidationError("has an item twice")


UNSUPPORTED = (
    "patternProperties",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
    "$recursiveRef",
)


def _refuse(schema: dict[str, Any]) -> None:
    for keyword in UNSUPPORTED:
        if _has(schema, keyword):
            raise UsageError(f"output: the JSON schema keyword {keyword!r} is not supported.")
    for reference in _found(schema, "$ref"):
        if not reference.startswith("#"):
            raise UsageError(
                f"output: the schema refers to {reference!r}; only references inside it (#/...) are followed."
            )
    for pattern in _found(schema, "pattern"):
        _regex(pattern)


_KEYWORDS = frozenset(
    [
        "type",
        "properties",
        "required",
        "items",
        "prefixItems",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
        "$ref",
        "$defs",
        "additionalProperties",
        "patternProperties",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minItems",
        "maxItems",
        "uniqueItems",
        "contains",
        "minProperties",
        "maxProperties",
        "propertyNames",
        "dependentRequired",
    ]
)


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
        stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _found(schema: Any, keyword: str) -> list[str]:
    return sorted({n[keyword] for n in _nodes(schema) if isinstance(n.get(keyword), str)})


def _has(schema: Any, keyword: str) -> bool:
    return any(isinstance(n.get(keyword), dict | str | bool) for n in _nodes(schema))


def _schema_problem(error: Any) -> str:
    where = _path(error.absolute_path)
    if error.validator == "required":
        missing = next((name for name in error.validator_value if name not in error.instance), "?")
        return f"{_path([*error.absolute_path, missing])} is missing"
    if error.validator == "type":
        kinds = (
            error.validator_value
            if isinstance(error.validator_value, list)
            else [error.validator_value]
        )
        return f"{where}: expected {' or '.join(kinds)}, got {_shown(error.instance)}"
    if error.validator in ("enum", "const"):
        allowed = error.validator_value if error.validator == "enum" else [error.validator_value]
        return f"{where}: expected one of {_shown(allowed)}, got {_shown(error.instance)}"
    if error.validator in ("anyOf", "oneOf"):
        best = min(
            error.context or [error], key=lambda e: (-len(e.absolute_path), str(e.validator))
        )
        return f"{where}: fits none of the allowed forms ({best.message[:SHOWN]})"
    return f"{where}: {error.message[: 2 * SHOWN]}"


def _path(parts: typing.Iterable[Any], root: str = "the answer") -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return f"`{text}`" if text else root


_repr = reprlib.Repr()  # bounded in depth and length


def _shown(value: Any) -> str:
    if isinstance(value, type):
        return value.__name__
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = _repr.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]}... ({len(text):,} characters)"


# -- leniency --------------------------------------------------------------------------------------
NUMBER = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}


def _loosened(value: Any, schema: Any, root: Mapping[str, Any], depth: int = 0) -> Any:
    """`value` with texts turned into what the schema wants in their place (numbers, booleans, null,
    whole JSON values), and the other way round nothing: a text stays a text where a text may
    stand."""
    if depth > 50 or not isinstance(schema, dict):
        return value
    _work.spend(1)
    schema = _resolved(schema, root)
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        kinds = {k for o in options if isinstance(o, dict) for k in _kinds(_resolved(o, root))}
        if isinstance(value, str) and "string" in kinds:
            return value
        for option in options:
            loose = _loosened(value, option, root, depth + 1)
            if loose is not value:
                return loose
        return value
    kinds = _kinds(schema)
    if isinstance(value, str) and kinds and "string" not in kinds:
        return _from_text(value, kinds, schema, root, depth)
    if (
        isinstance(value, float)
        and value.is_integer()
        and "integer" in kinds
        and "number" not in kinds
    ):
        return int(value)
    if isinstance(value, dict) and isinstance(schema.get("properties"), dict | None):
        properties, other = schema.get("properties") or {}, schema.get("additionalProperties")
        new = {k: _loosened(v, properties.get(k, other), root, depth + 1) for k, v in value.items()}
        return new if any(new[k] is not value[k] for k in value) else value
    if isinstance(value, list):
        first = schema.get("prefixItems") or []
        schemas = [first[i] if i < len(first) else schema.get("items") for i in range(len(value))]
        items = [_loosened(v, s, root, depth + 1) for v, s in zip(value, schemas, strict=True)]
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _from_text(
    text: str, kinds: set[str], schema: dict[str, Any], root: Mapping[str, Any], depth: int
) -> Any:
    bare = text.strip()
    if kinds & {"integer", "number"} and len(bare) < 400 and NUMBER.fullmatch(bare):
        digits = bare.replace(",", "")
        if re.fullmatch(r"[-+]?\d+", digits):
            return int(digits)
        if "number" in kinds or float(digits).is_integer():
            number = float(digits)
            return int(number) if "number" not in kinds and number.is_integer() else number
    if "boolean" in kinds and bare.lower() in BOOLEANS:
        return BOOLEANS[bare.lower()]
    if "null" in kinds and bare.lower() in ("null", "none", ""):
        return None
    if kinds & {"object", "array"}:
        parsed = _work.json_in(text)
        if parsed is not None and isinstance(
            parsed[0], dict if "object" in kinds and "array" not in kinds else dict | list
        ):
            return _loosened(parsed[0], schema, root, depth + 1)
        if "array" in kinds and parsed is not None and isinstance(parsed[0], list):
            return _loosened(parsed[0], schema, root, depth + 1)
    return text


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {k for k in kind if isinstance(k, str)}
    names = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "number",
        type(None): "null",
        list: "array",
        dict: "object",
    }
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    return {names[type(v)] for v in values if type(v) in names}


def _resolved(schema: dict[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    for _ in range(8):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return schema
        _work.spend(1 + len(reference) // 64)
        node: Any = root
        for step in reference[2:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            node = node.get(step) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            return schema
        schema = node
    return schema
