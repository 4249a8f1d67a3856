"""What several checks say alike."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

from mor_jax.errors import ConfigError


def one_of(where: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = nearest(value, valid)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(f"{where} must be one of {', '.join(valid)}; got {value!r}.{hint}")


def positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{where}.{name} must be positive, got {value}.")


def nearest_multiples(value: int, of: int) -> str:
    low = value // of * of
    return ", ".join(str(v) for v in (low, low + of) if v > 0)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is most like this one, if any is like it."""
    return next(iter(difflib.get_close_matches(name, list(valid), n=1)), None)


def not_negative(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{where}.{name} must be a number and not negative, got {value}.")
