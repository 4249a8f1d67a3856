"""Python values as JSON: sensible conversions, a bound on depth and size, and errors a model can
act on."""

from __future__ import annotations

import _json
import sys

DEPTH = 60
NODES = 195_000  # values, keys included; the host refuses more
INT_DIGITS = 1000


class NotJson(TypeError):
    """A value that has no JSON form; the message says which and what to do."""


def plain(value, what: str = "the value"):
    """`value` out of None, bool, int, float, str, list and dict only. Raises NotJson."""
    return _plain(value, what, DEPTH, [NODES])


def _plain(value, what: str, depth: int, left: list[int]):
    left[0] -= 1
    if left[0] < 0:
        raise NotJson(f"{what} has more than {NODES:,} items; pass text, or fewer items at a time.")
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        if value.bit_length() > INT_DIGITS * 3:
            raise NotJson(
                f"{what} holds an integer of more than {INT_DIGITS} digits; turn it into text with hex()."
            )
        return value
    if kind is float:
        if value - value != 0.0:
            raise NotJson(
                f"{what} holds {value!r}, which JSON has no number for; use None or a string."
            )
        return value
    if depth == 0:
        raise NotJson(
            f"{what} is nested deeper than {DEPTH} levels (or contains itself); flatten it."
        )
    if isinstance(value, dict):
        left[0] -= len(value)
        return {_key(k, what): _plain(v, what, depth - 1, left) for k, v in list(value.items())}
    if isinstance(value, (list, tuple)):
        return [_plain(item, what, depth - 1, left) for item in list(value)]
    if isinstance(value, (set, frozenset)):
        return [_plain(item, what, depth - 1, left) for item in _in_order(value)]
    return _plain(_known(value, what), what, depth - 1, left)


def _key(key, what: str) -> str:
    if isinstance(key, str):
        return str.__str__(key)
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, (int, float)):
        return str(key)
    raise NotJson(
        f"{what} has a dict key of type {type(key).__name__}; JSON keys are strings: use str(key)."
    )


def _in_order(values) -> list:
    try:
        return sorted(values)
    except Exception:
        return sorted(values, key=repr)


def _known(value, what: str):
    """One step towards JSON for types people use: the rest is an error that names the type."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise NotJson(
                f"{what} holds bytes that are not UTF-8 text; decode them or use .hex()."
            ) from None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (range, type({}.keys()), type({}.values()), type({}.items()))):
        return list(value)
    if is_dataclass_value(value):
        return {name: getattr(value, name) for name in type(value).__dataclass_fields__}
    module = (type(value).__module__ or "").split(".")[0]
    if module == "numpy" and hasattr(value, "tolist"):  # arrays and scalars
        return value.tolist()
    if module == "collections" and type(value).__name__ in ("deque", "UserList"):
        return list(value)
    if module == "datetime" and hasattr(value, "isoformat"):
        return value.isoformat()
    if module in ("pathlib", "uuid", "decimal", "fractions"):
        return str(value)
    enum = sys.modules.get("enum")
    if enum is not None and isinstance(value, enum.Enum):
        return value.value
    if module == "worker" and type(value).__name__ == "Text":
        return str(value)  # says itself when it is too long for one string
    if module == "worker" and type(value).__name__ == "Folder":
        return {name: value[name] for name in value}
    raise NotJson(
        f"{what} holds a {type(value).__name__}, which has no JSON form; use str, list, dict or numbers."
    )


def is_dataclass_value(value) -> bool:
    return not isinstance(value, type) and isinstance(
        getattr(type(value), "__dataclass_fields__", None), dict
    )


def _refuse(value):
    raise NotJson(f"{type(value).__name__} is not JSON")


class _Reading:
    """What the C scanner asks for."""

    strict = False
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = (
        float,
        int,
        {"NaN": None, "Infinity": None, "-Infinity": None}.get,
    )
    memo: dict = {}  # noqa: RUF012 - read by the scanner


# The C halves of the json module, taken before any cell can put something else in their place.
_encode = _json.make_encoder(
    None, _refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, False
)
_scan = _json.make_scanner(_Reading())


def dumps(value) -> bytes:
    """JSON in ASCII, on one line."""
    return "".join(_encode(value, 0)).encode("ascii")


def loads(text: str):
    """A JSON text without blanks in front, from the host."""
    return _scan(text, 0)[0]
