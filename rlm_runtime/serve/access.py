"""API keys from a file, and the host names that a server without keys accepts."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path

from rlm_runtime.errors import UsageError


def read_keys(path: str, flag: str) -> list[str]:
    """One key a line; empty lines and lines that begin with # are left out. Raises UsageError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}.") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{flag} {path} holds no key.")
    return keys


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def host_names(host: str, allowed: Iterable[str], keys: Iterable[str]) -> tuple[str, ...]:
    """Names the Host header may carry. A web page must not reach a keyless server under its own name."""
    names = tuple(name.lower() for name in allowed)
    if is_loopback(host) and not tuple(keys) and "*" not in names:
        names += ("localhost", "127.0.0.1", "::1", host.lower())
    return names or ("*",)
