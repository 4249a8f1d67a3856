"""What a model server allows beyond what every server here does."""

from __future__ import annotations

from pydantic import Field

from rlm_runtime.serve.http.settings import HttpSettings


class ModelSettings(HttpSettings):
    """Seconds unless the name says otherwise. How many sequences may wait is the engine's own
    bound."""

    max_runs: int = Field(256, ge=1)  # requests inside at once; each may have many sequences
    max_queue: int = Field(0, ge=0)  # the engine has the queue
    body_bytes: int = Field(16 << 20, ge=1024)
    # between comments on a silent stream, as in a long prefill
    keep_alive_seconds: float = Field(5.0, gt=0)

    max_sequences: int = Field(1024, ge=1)  # prompts x best_of of one request
    # of all prompts of one request, before they are encoded
    max_prompt_chars: int = Field(8 << 20, ge=1)
    # longest life of a request; a client's own deadline may be shorter
    request_seconds: float = Field(600.0, gt=0)
    # a request counts as good when its first token came within this ...
    goal_ttft_seconds: float = Field(1.0, gt=0)
    # ... and the mean time between its tokens was at most this
    goal_itl_seconds: float = Field(0.1, gt=0)
