"""A headless Chromium driven over its own debugging pipe: no driver, no web socket, nothing to
install but Chromium."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]


def find() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One Chromium process. Its file descriptors 3 and 4 carry JSON messages that end in a NUL."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp(prefix="rlm-chromium-")
        to_read, self.to = os.pipe()
        self.back, back_write = os.pipe()

        def descriptors() -> None:  # after the fork: what Chromium expects as 3 and 4
            high_read, high_write = os.dup(to_read), os.dup(back_write)
            os.dup2(high_read, 3)
            os.dup2(high_write, 4)

        self.process = subprocess.Popen(
            [find() or "chromium", *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            preexec_fn=descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(back_write)
        self.buffer = b""
        self.number = 0
        self.events: list[dict[str, Any]] = []

    def call(
        self, method: str, session: str | None = None, limit: float = 60, **params: Any
    ) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + limit
        while True:
            got = self.receive(end)
            if got.get("id") == message["id"]:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']['message']}")
                return got["result"]
            self.events.append(got)

    def receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.back], [], [], max(0, end - time.monotonic()))
            data = os.read(self.back, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("Chromium does not answer")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def page(self, url: str, width: int = 1440, height: int = 900, dark: bool = False) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.call("Emulation.setEmulatedMedia", features=features)
        page.call("Page.navigate", url=url)
        return page

    def close(self) -> None:
        try:
            self.call("Browser.close", limit=5)
            self.process.wait(10)
        except Exception:
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)


class Page:
    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        got = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in got:
            raise RuntimeError(
                got["exceptionDetails"].get("exception", {}).get("description", "script failed")
            )
        return got["result"].get("value")

    def wait(self, script: str, limit: float = 20) -> Any:
        """Until the expression is true; one that fails (the page is still coming) is not. Returns
        its value."""
        end = time.monotonic() + limit
        while True:
            with contextlib.suppress(RuntimeError):
                if value := self.run(script):
                    return value
                self.run("new Promise(done => setTimeout(done, 30))")
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {script}\n{self.trouble()}")

    def ready(self) -> float:
        """Milliseconds from the start of the navigation to the first full render."""
        return float(self.wait("document.documentElement?.dataset.ready"))

    def key(self, key: str, shift: bool = False) -> None:
        text = key if len(key) == 1 else "\r" if key == "Enter" else ""
        common = {
            "key": key,
            "modifiers": 8 if shift else 0,
            "windowsVirtualKeyCode": CODES.get(key, 0),
        }
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def picture(self, path: Path) -> None:
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def trouble(self) -> list[str]:
        """Exceptions, refused scripts, console errors and dialogs since the page began."""
        self.run("1")  # collects what is still in the pipe
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(json.dumps(event["params"]["exceptionDetails"])[:600])
                case "Log.entryAdded" if event["params"]["entry"]["level"] == "error":
                    found.append(event["params"]["entry"]["text"])
                case "Runtime.consoleAPICalled" if event["params"]["type"] in ("error", "assert"):
                    found.append(json.dumps(event["params"]["args"])[:600])
                case "Page.javascriptDialogOpening":
                    found.append("dialog: " + event["params"]["message"])
        return found


CODES = {
    "Enter": 13,
    "Escape": 27,
    "ArrowDown": 40,
    "ArrowUp": 38,
    "ArrowLeft": 37,
    "ArrowRight": 39,
}
