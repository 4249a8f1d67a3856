"""What several checks say alike."""

from __future__ import annotations

import difflib
import math

from mor_jax.errors import ConfigError


def one_of(where: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where} must be one of {', '.join(valid)}; got {value!r}.{hint}")


def positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{where}.{name} must be positive, got {value}.")


def nearest_multiples(value: int, of: int) -> str:
    low = value // of * of
    return ", ".join(str(v) for v in (low, low + of) if v > 0)
