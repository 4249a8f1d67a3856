"""Language models behind an OpenAI-compatible endpoint: completions, chat, streams, metrics.

`create_app(load, settings)` makes the ASGI application; `launch.serve` runs it. A request goes
through these steps: checks (middleware), admission, a plan (validated fields, prompts as token ids,
engine requests), sequences (tokens become text, stop strings end them), and a reply, whole or as
events. The engine is any object with the members of `backend.Service`. This package does not import
JAX.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ModelBackend", "ModelSettings", "create_app"]


def __getattr__(name: str) -> Any:
    """The parts are loaded when they are asked for."""
    if name == "ModelBackend":
        from rlm_runtime.serve.model.backend import ModelBackend

        return ModelBackend
    if name == "ModelSettings":
        from rlm_runtime.serve.model.settings import ModelSettings

        return ModelSettings
    if name == "create_app":
        from rlm_runtime.serve.model.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
