"""What well-known models cost and hold. Prices change: pass `price=`, or name a JSON file in
RLM_PRICES.

Without either, the table of the package `genai-prices` is asked where it is installed (the extra
`prices`), then the small one below.

The file: {"openai:gpt-5-mini": {"input": 0.25, "output": 2.0, "cached": 0.025}, ...}, dollars per
million tokens. A key without a provider ("my-model") holds for every provider.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rlm_runtime.errors import UsageError


class Price(NamedTuple):
    """Dollars per million tokens. `cached` is for prompt tokens the endpoint had in its cache;
    None: as `input`."""

    input: float
    output: float
    cached: float | None = None

    def dollars(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
        cached = self.input if self.cached is None else self.cached
        fresh = input_tokens - cached_tokens
        return (fresh * self.input + cached_tokens * cached + output_tokens * self.output) / 1e6


class Tiered:
    """A price of `genai-prices`, whose rates may depend on the length of the prompt."""

    def __init__(self, model: Any, provider: Any):
        self._model, self._provider = model, provider

    def dollars(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
        from genai_prices import Usage

        cached = min(cached_tokens, input_tokens)
        usage = Usage(
            input_tokens=input_tokens, output_tokens=output_tokens, cache_read_tokens=cached
        )
        return float(self._model.calc_price(usage, self._provider).total_price)


class Known(NamedTuple):
    price: Price | Tiered
    window: int | None  # tokens, prompt and reply


# List prices for standard processing and context windows as published by the vendors in November
# 2025.
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
# hosts of vendors that genai-prices lists
OFFICIAL = {"openai": "api.openai.com", "anthropic": "api.anthropic.com"}
_DATE = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8}|latest)$")  # a snapshot costs what the model costs


def known(name: str, url: str | None = None) -> Known | None:
    """What is known of "provider:model"; None: nothing. `url`: of the endpoint, which may be
    another vendor's."""
    ours = KNOWN.get(name) or KNOWN.get(_DATE.sub("", name))
    theirs = market(name, url)
    return (
        theirs._replace(window=theirs.window or (ours.window if ours else None)) if theirs else ours
    )


def market(name: str, url: str | None = None) -> Known | None:
    """As `known`, by the table of `genai-prices`; None also where that is not installed.

    A model at another vendor's URL has that vendor's price; at a URL that is no vendor's, its price
    is not known."""
    provider, _, model = name.partition(":")
    official = OFFICIAL.get(provider)
    host = official if url is None else urlsplit(url).hostname
    if official is None or not model or _has_no_vendor(host):
        return None
    here = host == official
    try:
        from genai_prices import data_snapshot
    except ImportError:
        return None
    try:
        snapshot = data_snapshot.get_snapshot()
        vendor, found = snapshot.find_provider_model(
            model, None, provider if here else None, None if here else url
        )
        price = _flat(found) or Tiered(found, vendor)
        if not price.dollars(1000, 1000) > 0:  # listed, but without a price of tokens
            return None
    # unlisted, or a table of another shape
    except (LookupError, ValueError, TypeError, AttributeError):
        return None
    return Known(price, found.context_window)


def _has_no_vendor(host: str | None) -> bool:
    """An address or this machine's name: importing the table (a tenth of a second) can be saved."""
    if host is None or host == "localhost":
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _flat(model: Any) -> Price | None:
    """The rates of a model of `genai-prices` that do not depend on the prompt's length; None: they
    do."""
    rates = model.get_prices(datetime.now(UTC))
    read, made, cached = (
        getattr(rates, name, None) for name in ("input_mtok", "output_mtok", "cache_read_mtok")
    )
    if not (
        isinstance(read, Decimal)
        and isinstance(made, Decimal)
        and isinstance(cached, Decimal | None)
    ):
        return None
    return Price(float(read), float(made), None if cached is None else float(cached))


class Table:
    """Price and window of one model: what the caller gave, else what is known, which is looked up
    when first needed (importing the table of `genai-prices` takes longer than starting a worker).

    Raises:
      UsageError: see `given_price`.
    """

    def __init__(
        self, name: str, url: str | None = None, *, given: Any = None, window: int | None = None
    ):
        self._name, self._url, self._price, self._window = (
            name,
            url,
            given_price(name, given),
            window,
        )

    @cached_property
    def _known(self) -> Known | None:
        return known(self._name, self._url)

    @property
    def price(self) -> Price | Tiered | None:
        return self._price or (self._known.price if self._known else None)

    @property
    def window(self) -> int | None:
        return self._window or (self._known.window if self._known else None)

    def warm(self) -> None:
        """Look it up now."""
        _ = self._known


def price_of(name: str, given: Any = None) -> Price | Tiered | None:
    """The price of "provider:model": as `given_price`, else as `known`; None: unknown."""
    found = given_price(name, given)
    if found is None and (listed := known(name)):
        return listed.price
    return found


def given_price(name: str, given: Any = None) -> Price | None:
    """The price the user names: `given`, else the entry of the file RLM_PRICES; None: neither.

    Args:
      given: a `Price`, (input, output) or (input, output, cached), a mapping with these keys, or
        the path of a JSON file (a file that lacks the model leaves the table in charge).
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
    return None


def load(path: str | os.PathLike[str]) -> dict[str, Price]:
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
        raise UsageError(
            f'price file {path}: expected an object {{"openai:MODEL": {{"input": ..., "output": ...}}}}.'
        )
    return {name: _price(entry, f"{path}: {name}") for name, entry in table.items()}


def _price(entry: Any, what: str) -> Price:
    try:
        price = Price(**entry) if isinstance(entry, Mapping) else Price(*entry)
        numbers = [float(x) for x in price if x is not None]
        if any(isinstance(x, bool) for x in price) or not all(
            math.isfinite(x) and x >= 0 for x in numbers
        ):
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(
            f"price of {what}: expected dollars per million tokens as (input, output[, cached]) or "
            f'{{"input": ..., "output": ..., "cached": ...}}, got {entry!r}.'
        ) from None
    return price
