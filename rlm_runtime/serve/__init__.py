"""Two servers that speak OpenAI's API, on one transport.

- `rlm/`: RLMs behind a chat endpoint; any client gains long context by changing its base URL.
  `create_app(models, settings)` makes the ASGI application; `rlm serve` runs it.
- `model/`: language models; see there. `launch.serve` runs it.
- `http/`: what both share.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ServeSettings", "ServedModel", "create_app"]


def __getattr__(name: str) -> Any:
    """The command line reads `ServeSettings` without loading a web framework."""
    if name == "ServeSettings":
        from rlm_runtime.serve.rlm.settings import ServeSettings

        return ServeSettings
    if name == "ServedModel":
        from rlm_runtime.serve.rlm.served import ServedModel

        return ServedModel
    if name == "create_app":
        from rlm_runtime.serve.rlm.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
