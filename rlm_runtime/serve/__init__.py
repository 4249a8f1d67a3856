"""RLMs behind an OpenAI-compatible endpoint: any client gains long context by changing its base URL.

`create_app(models, settings)` makes the ASGI application; `rlm serve` runs it.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ServeSettings", "ServedModel", "create_app"]


def __getattr__(name: str) -> Any:
    """The command line reads `ServeSettings` without loading a web framework."""
    if name == "ServeSettings":
        from rlm_runtime.serve.settings import ServeSettings

        return ServeSettings
    if name == "ServedModel":
        from rlm_runtime.serve.engine import ServedModel

        return ServedModel
    if name == "create_app":
        from rlm_runtime.serve.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
