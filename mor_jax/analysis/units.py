"""Numbers a person reads: 118M, 555.7 MFLOPs, 1.2 h."""

from __future__ import annotations

import math

NONE = "–"  # for what does not exist or was not measured
_SPACE = "\u00a0"  # between a number and its unit: a line does not break there

_PREFIXES = ((1e3, "k"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"), (1e18, "E"))


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """`value` with an SI prefix and `digits` significant digits: si(555.7e6, "FLOPs") is "556
    MFLOPs"."""
    if value is None or not math.isfinite(value):
        return NONE
    scale, prefix = 1.0, ""
    for limit, letter in _PREFIXES:
        if abs(value) >= limit * 0.9995:
            scale, prefix = limit, letter
    number = significant(value / scale, digits)
    return f"{number}{_SPACE}{prefix}{unit}" if unit else number + prefix


def count(value: float | None) -> str:
    """Like `si`, with the B of billions that language models are counted in: 1.61B, 118M, 9438."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.0f}" if abs(value) < 1e4 else si(value).replace("G", "B")


def significant(value: float, digits: int = 3) -> str:
    """Fixed notation with `digits` significant digits, never fewer digits than the integer part
    has."""
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # round first: 999.96 has four digits before the point
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def fixed(value: float | None, decimals: int = 3) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return (
        NONE
        if value is None or not math.isfinite(value)
        else f"{100 * value:.{decimals}f}{_SPACE}%"
    )


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None or not math.isfinite(value):
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{significant(value, 3)}{_SPACE}{unit}"
        value /= 1024
    raise AssertionError("unreachable")


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 100:
        return f"{significant(seconds, 2)}{_SPACE}s"
    if seconds < 5400:
        return f"{significant(seconds / 60, 2)}{_SPACE}min"
    return f"{significant(seconds / 3600, 2)}{_SPACE}h"
