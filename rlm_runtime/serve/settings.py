"""Settings of a server: all limits that a client can meet."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlm_runtime.lms.base import Frozen
from rlm_runtime.serve.schemas import Progress


class ServeSettings(Frozen):
    """Bytes and seconds unless the name says otherwise."""

    api_keys: tuple[str, ...] = ()  # none: everyone who can reach the port may use it
    allowed_hosts: tuple[str, ...] = ("*",)  # names the Host header may carry, without port
    cors_origins: tuple[str, ...] = ()  # web pages that may call; none by default

    max_runs: int = Field(4, ge=1)  # at once
    max_queue: int = Field(16, ge=0)  # waiting for their turn; more get 429
    queue_seconds: float = Field(120.0, gt=0)  # longest wait
    drain_seconds: float = Field(30.0, ge=0)  # running requests may finish after SIGTERM, then they are cancelled

    body_bytes: int = Field(64 << 20, ge=1024)  # of a JSON request
    body_idle_seconds: float = Field(30.0, gt=0)  # between two pieces of a body
    body_pace: int = Field(16 << 10, ge=1)  # bytes a second a body must keep up, after the first idle time
    send_seconds: float = Field(60.0, gt=0)  # a client that reads nothing for so long is gone
    header_seconds: float = Field(20.0, gt=0)  # until a connection has sent the head of a request
    max_connections: int = Field(1024, ge=1)

    file_bytes: int = Field(2 << 30, ge=1)  # one upload
    files_bytes: int = Field(16 << 30, ge=1)  # all uploads together
    files_per_key: int = Field(1_000, ge=1)
    file_seconds: float = Field(7 * 86_400.0, gt=0)  # until an upload is removed
    files_dir: Path | None = None  # None: a private folder that ends with the server

    question_chars: int = Field(8_000, ge=100)  # a longer text is material rather than a question
    keep_alive_seconds: float = Field(10.0, gt=0)  # between comments on a silent stream
    progress: Progress = "field"
    log_dir: Path | None = None  # trajectories; None keeps none
