"""The page's files and the rules under which a browser runs them."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

HERE = Path(__file__).parent
STYLE = "page.css"
# In this order: each is a plain script that uses the ones before it.
SCRIPTS = (
    "text.js",
    "model.js",
    "source.js",
    "tree.js",
    "timeline.js",
    "detail.js",
    "runs.js",
    "page.js",
)


def text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def hashed(content: str) -> str:
    """The source expression that allows exactly this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def policy(scripts: str, styles: str, connect: str) -> str:
    """Nothing but the page's own scripts and styles: text of a run that smuggled in markup could do
    nothing."""
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src {connect}; img-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    )
