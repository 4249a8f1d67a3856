"""What well-known models cost and hold. Prices change: pass `price=`, or name a JSON file in RLM_PRICES.

The file: {"openai:gpt-5-mini": {"input": 0.25, "output": 2.0, "cached": 0.025}, ...}, dollars per million tokens. A
key without a provider ("my-model") holds for every provider.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlm_runtime.errors import UsageError


class Price(NamedTuple):
    """Dollars per million tokens. `cached` is for prompt tokens the endpoint had in its cache; None: as `input`."""

    input: float
    output: float
    cached: float | None = None

    def dollars(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
        cached = self.input if self.cached is None else self.cached
        fresh = input_tokens - cached_tokens
        return (fresh * self.input + cached_tokens * cached + output_tokens * self.output) / 1e6


class Known(NamedTuple):
    price: Price
    window: int  # tokens, prompt and reply


# List prices for standard processing and context windows as published by the vendors in November 2025.
KNOWN: dict[str, Known] = {
    "openai:gpt-5.1": Known(Price(1.25, 10.0, 0.125), 400_000),
    "openai:gpt-5": Known(Price(1.25, 10.0, 0.125), 400_000),
    "openai:gpt-5-mini": Known(Price(0.25, 2.0, 0.025), 400_000),
    "openai:gpt-5-nano": Known(Price(0.05, 0.4, 0.005), 400_000),
    "openai:gpt-4.1": Known(Price(2.0, 8.0, 0.5), 1_047_576),
    "openai:gpt-4.1-mini": Known(Price(0.4, 1.6, 0.1), 1_047_576),
    "openai:gpt-4.1-nano": Known(Price(0.1, 0.4, 0.025), 1_047_576),
    "openai:gpt-4o": Known(Price(2.5, 10.0, 1.25), 128_000),
    "openai:gpt-4o-mini": Known(Price(0.15, 0.6, 0.075), 128_000),
    "openai:o3": Known(Price(2.0, 8.0, 0.5), 200_000),
    "openai:o4-mini": Known(Price(1.1, 4.4, 0.275), 200_000),
    "anthropic:claude-opus-4-5": Known(Price(5.0, 25.0, 0.5), 200_000),
    "anthropic:claude-opus-4-1": Known(Price(15.0, 75.0, 1.5), 200_000),
    "anthropic:claude-sonnet-4-5": Known(Price(3.0, 15.0, 0.3), 200_000),
    "anthropic:claude-sonnet-4": Known(Price(3.0, 15.0, 0.3), 200_000),
    "anthropic:claude-haiku-4-5": Known(Price(1.0, 5.0, 0.1), 200_000),
    "anthropic:claude-3-5-haiku": Known(Price(0.8, 4.0, 0.08), 200_000),
}
_DATE = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8}|latest)$")  # a snapshot costs what the model costs


def known(name: str) -> Known | None:
    """What is known of "provider:model"; None: nothing."""
    return KNOWN.get(name) or KNOWN.get(_DATE.sub("", name))


def price_of(name: str, given: Any = None) -> Price | None:
    """The price of "provider:model": `given`, else the file RLM_PRICES names, else the table; None: unknown.

    Args:
      given: a `Price`, (input, output) or (input, output, cached), a mapping with these keys, or the path of a JSON
        file (a file that lacks the model leaves the table in charge).
    Raises:
      UsageError: a price that is none, an unreadable file.
    """
    if given is not None and not isinstance(given, str | os.PathLike):
        return _price(given, name)
    path = given or os.environ.get("RLM_PRICES")
    if path:
        table = load(path)
        for key in (name, _DATE.sub("", name), name.partition(":")[2]):
            if key in table:
                return table[key]
    found = known(name)
    return found.price if found else None


def load(path: str | os.PathLike) -> dict[str, Price]:
    """Prices by model of a JSON file.

    Raises:
      UsageError: no such file, not JSON, an entry that is no price; the message names the entry.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"price file {path}: {e.strerror or e}.") from e
    except ValueError as e:
        raise UsageError(f"price file {path} is not JSON: {e}.") from e
    if not isinstance(table, dict):
        raise UsageError(f'price file {path}: expected an object {{"openai:MODEL": {{"input": ..., "output": ...}}}}.')
    return {name: _price(entry, f"{path}: {name}") for name, entry in table.items()}


def _price(entry: Any, what: str) -> Price:
    try:
        price = Price(**entry) if isinstance(entry, Mapping) else Price(*entry)
        numbers = [float(x) for x in price if x is not None]
        if any(isinstance(x, bool) for x in price) or not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(
            f"price of {what}: expected dollars per million tokens as (input, output[, cached]) or "
            f'{{"input": ..., "output": ..., "cached": ...}}, got {entry!r}.'
        ) from None
    return price
