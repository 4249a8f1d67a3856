"""Takes the viewer's pictures in docs/images anew: `python tests/rlm/viewer/pictures.py`."""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rlm.big_trajectory import build, write  # noqa: E402
from rlm.viewer import attack  # noqa: E402
from rlm.viewer.browser import Browser  # noqa: E402
from rlm_runtime.viewer import running  # noqa: E402

EVENTS = build()
CHILD = next(e.node for e in EVENTS if e.type == "node_start" and e.kind == "rlm")
PICTURES = {
    "viewer-turn": ("#run=harbour&at=0%238", False),
    "viewer-child": (f"#run=harbour&at={CHILD}%232", True),
    "viewer-hostile": ("#run=hostile&at=0%2310", False),
}


def main(out: Path) -> None:
    browser = Browser()
    try:
        with tempfile.TemporaryDirectory() as folder, running(folder) as url:
            write(Path(folder) / "harbour", EVENTS)
            write(Path(folder) / "hostile", attack.events())
            for name, (where, dark) in PICTURES.items():
                page = browser.page(url + where, dark=dark)
                page.ready()
                page.key("l")
                page.run(
                    "document.fonts.ready.then(() => new Promise(done => setTimeout(done, 300)))"
                )
                page.picture(out / f"{name}.png")
                print(name, (out / f"{name}.png").stat().st_size // 1000, "kB")
    finally:
        browser.close()


if __name__ == "__main__":
    main(ROOT / "docs" / "images")
