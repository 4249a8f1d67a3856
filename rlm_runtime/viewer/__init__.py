"""A page for trajectories: `serve` shows a file or a folder of runs, live; `export` makes one
self-contained HTML file.

The page is plain files (`page.html`, `page.css`, `*.js`) without a build step, a network, or
anything from elsewhere. Starlette and uvicorn (extra "serve") are imported when a page is served,
not before.
"""

from __future__ import annotations

from typing import Any

__all__ = ["export", "make_app", "running", "serve"]


def __getattr__(name: str) -> Any:
    if name == "export":
        from rlm_runtime.viewer.one_file import export

        return export
    if name in __all__:
        from rlm_runtime.viewer import server

        return getattr(server, name)
    raise AttributeError(name)
