"""What values a context may hold, checked before anything is sent anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlm_runtime.errors import ContextError

PIECE = 4 << 20  # characters or bytes written at a time
DEEPEST = 500  # nesting; both sides read JSON recursively


def plain(x: Any) -> Any:
    """A pydantic model (a Message, say) as the dict it is."""
    return x.model_dump(mode="json") if callable(getattr(x, "model_dump", None)) else x


def are_messages(value: list) -> bool:
    return all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)


def check_json(value: Any) -> None:
    """What `json.dumps` would change silently, or explain badly, is a ContextError that says where it is."""
    stack: list[tuple[Any, tuple | None, int]] = [(value, None, 1)]  # value, (place of its holder, key), depth
    while stack:
        here, place, depth = stack.pop()
        if depth > DEEPEST:
            raise ContextError(f"context: nested more than {DEEPEST} deep, at {where(place)[:200]}...")
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


def where(place: tuple | None) -> str:
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
