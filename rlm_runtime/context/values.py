"""What values a context may hold, checked before anything is sent anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rlm_runtime.errors import ContextError

PIECE = 4 << 20  # characters or bytes written at a time
DEEPEST = 500  # nesting; both sides read JSON recursively


def plain(x: Any) -> Any:
    """A pydantic model (a Message, say) as the dict it is."""
    return x.model_dump(mode="json") if callable(getattr(x, "model_dump", None)) else x


def are_messages(value: list[Any]) -> bool:
    return all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value
    )


Place = tuple[Any, Any]  # (place of its holder, key)


def check_json(value: Any) -> None:
    """What `json.dumps` would change silently, or explain badly, is a ContextError that says where
    it is."""
    # value, (place of its holder, key), depth
    stack: list[tuple[Any, Place | None, int]] = [(value, None, 1)]
    while stack:
        here, place, depth = stack.pop()
        if depth > DEEPEST:
            raise ContextError(
                f"context: nested more than {DEEPEST} deep, at {where(place)[:200]}..."
            )
        if isinstance(here, dict):
            for key in here:
                if not isinstance(key, str):
                    raise ContextError(
                        f"context: the keys of a dict must be str; {where(place)} has the key {key!r} of type "
                        f"{type(key).__name__}. Convert the keys first."
                    )
        for key, below in here.items() if isinstance(here, dict) else enumerate(here):
            if isinstance(below, dict | list | tuple):
                stack.append((below, (place, key), depth + 1))
            elif not isinstance(below, str | int | float | bool | None):
                raise ContextError(
                    f"context: {where((place, key))} is a {type(below).__name__}; inside a list or dict only str, "
                    "numbers, bool, None, lists and dicts are taken."
                )


def where(place: Place | None) -> str:
    """`context[3]['name']` of a place."""
    keys = []
    while place is not None:
        place, key = place
        keys.append(f"[{key if isinstance(key, int) else repr(key[:40])}]")
    return "context" + "".join(reversed(keys))


def nodes(data: bytes) -> int:
    """About how many values JSON text holds."""
    return data.count(b",") + data.count(b":") + data.count(b"[") + data.count(b"{") + 1


def encoded(text: str) -> Iterator[bytes]:
    for i in range(0, len(text), PIECE):
        yield text[i : i + PIECE].encode("utf-8", "surrogatepass")


TABLE_BYTES = 256 << 20  # of a table as text


def is_table(x: Any) -> bool:
    """A DataFrame of pandas, polars, ... or a pyarrow Table: what Arrow's stream interface can
    read."""
    return hasattr(x, "__arrow_c_stream__") or (
        type(x).__module__.partition(".")[0] == "pandas" and hasattr(x, "columns")
    )


def table(x: Any) -> tuple[str, str]:
    """A table as JSON lines, and what that is. Raises ContextError where pyarrow is missing or the
    table is too big."""
    try:
        import pyarrow
    except ImportError:
        raise ContextError(
            f"context: a {type(x).__name__} is read with the package pyarrow: pip install pyarrow. Or pass text or rows, "
            "such as df.to_csv() or df.to_dict('records')."
        ) from None
    try:
        if hasattr(x, "__arrow_c_stream__"):
            found = pyarrow.RecordBatchReader.from_stream(x)
        else:
            found = pyarrow.Table.from_pandas(x).to_reader()
        columns = ", ".join(
            f"{field.name[:80]!r}: {field.type}" for field in list(found.schema)[:24]
        )
        lines, rows, room = [], 0, TABLE_BYTES
        for batch in found:
            for start in range(0, batch.num_rows, 1000):
                text = "".join(
                    json.dumps(row, ensure_ascii=False, default=str) + "\n"
                    for row in batch.slice(start, 1000).to_pylist()
                )
                lines.append(text)
                rows, room = rows + text.count("\n"), room - len(text)
                if room < 0:
                    raise ContextError(
                        f"context: the table takes more than {TABLE_BYTES >> 20} MiB as text. Write it to a file "
                        "(df.to_csv(path)) and pass its Path."
                    )
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise ContextError(
            f"context: the {type(x).__name__} cannot be read as a table: {error}."
        ) from None
    if not rows:
        raise ContextError("context: an empty table was given; there is nothing to answer from.")
    return "".join(
        lines
    ), f"a table of {rows:,} rows as JSON lines, a row an object on a line ({columns})"
