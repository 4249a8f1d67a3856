"""Settings of every server: the limits that a client can meet, API keys from a file, and accepted
host names."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import Frozen


class HttpSettings(Frozen):
    """Bytes and seconds unless the name says otherwise."""

    api_keys: tuple[str, ...] = ()  # none: everyone who can reach the port may use it
    allowed_hosts: tuple[str, ...] = ("*",)  # names the Host header may carry, without port
    cors_origins: tuple[str, ...] = ()  # web pages that may call; none by default

    max_runs: int = Field(4, ge=1)  # at once
    max_queue: int = Field(16, ge=0)  # waiting for their turn; more get 429
    queue_seconds: float = Field(120.0, gt=0)  # longest wait
    # running requests may finish after SIGTERM, then they are cancelled
    drain_seconds: float = Field(30.0, ge=0)

    body_bytes: int = Field(64 << 20, ge=1024)  # of a JSON request
    body_idle_seconds: float = Field(30.0, gt=0)  # between two pieces of a body
    # bytes a second a body must keep up, after the first idle time
    body_pace: int = Field(16 << 10, ge=1)
    send_seconds: float = Field(60.0, gt=0)  # a client that reads nothing for so long is gone
    header_seconds: float = Field(20.0, gt=0)  # until a connection has sent the head of a request
    keep_alive_seconds: float = Field(10.0, gt=0)  # between comments on a silent stream
    max_connections: int = Field(1024, ge=1)

    file_bytes: int = Field(2 << 30, ge=1)  # one upload


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
    """Names the Host header may carry. A web page must not reach a keyless server under its own
    name."""
    names = tuple(name.lower() for name in allowed)
    if is_loopback(host) and not tuple(keys) and "*" not in names:
        names += ("localhost", "127.0.0.1", "::1", host.lower())
    return names or ("*",)
