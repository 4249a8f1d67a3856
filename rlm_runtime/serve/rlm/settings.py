"""What an RLM server has beyond `HttpSettings`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from rlm_runtime.serve.http.settings import HttpSettings
from rlm_runtime.serve.rlm.schemas import Progress


class ServeSettings(HttpSettings):
    """Bytes and seconds unless the name says otherwise."""

    files_bytes: int = Field(16 << 30, ge=1)  # all uploads together
    files_per_key: int = Field(1_000, ge=1)
    file_seconds: float = Field(7 * 86_400.0, gt=0)  # until an upload is removed
    files_dir: Path | None = None  # None: a private folder that ends with the server

    question_chars: int = Field(8_000, ge=100)  # a longer text is material rather than a question
    progress: Progress = "field"
    log_dir: Path | None = None  # trajectories; None keeps none
