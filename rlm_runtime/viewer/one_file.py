"""One HTML file that holds a run and the page that shows it; opens from disk, asks no network for
anything."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from rlm_runtime.errors import UsageError
from rlm_runtime.trajectory import events_file
from rlm_runtime.viewer import assets
from rlm_runtime.viewer.data import EventsFile, dumps

# Inside a script element only `</script`, `<!--` matter to the parser; these leave it nothing to
# look at.
ESCAPES = {
    ord("<"): "\\u003c",
    ord(">"): "\\u003e",
    ord("&"): "\\u0026",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def export(path: Path | str, out: Path | str) -> Path:
    """Write the run at `path` (folder or events file) as the page `out`. Raises UsageError where
    either is no good."""
    out = Path(out)
    run = EventsFile(events_file(path))
    page = render(run)
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, out)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UsageError(f"The page {out} cannot be written: {error.strerror}.") from error
    return out


def render(run: EventsFile) -> str:
    events = run.everything()
    name = run.path.parent.name or run.path.stem
    data = dumps({"run": name, "events": events, "complete": run.complete}).translate(ESCAPES)
    style, scripts = assets.text(assets.STYLE), [assets.text(name) for name in assets.SCRIPTS]
    rules = assets.policy(" ".join(map(assets.hashed, scripts)), assets.hashed(style), "'none'")
    page = assets.text("page.html")
    head = f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n<style>{style}</style>'
    body = f'<script type="application/json" id="data">{data}</script>\n'
    body += "\n".join(f"<script>{script}</script>" for script in scripts)
    page = page.replace("<!-- style -->", head)
    before, after = page.split("<!-- scripts -->")  # not replace: the data may hold any marker
    return before + body + after
