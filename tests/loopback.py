"""An application on a loopback port, served by `serve` itself in a thread of this process; and
requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rlm_runtime.serve.http.server import bind, serve


class Loopback:
    """A running server and its parts."""

    def __init__(self, port: int, app: Any, stop: Callable[[], None], done: threading.Event):
        self.port, self.app, self.stop, self.done = port, app, stop, done
        self.url = f"http://127.0.0.1:{port}/v1"
        self.metrics, self.admission = app.state.metrics, app.state.admission

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = self.begin(method, path, body, headers, timeout)
        try:
            response = connection.getresponse()
            return (
                response.status,
                {k.lower(): v for k, v in response.getheaders()},
                response.read(),
            )
        finally:
            connection.close()

    def begin(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> http.client.HTTPConnection:
        """A request whose answer is not waited for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if isinstance(body, dict | list):
            body, headers = (
                json.dumps(body).encode(),
                {"Content-Type": "application/json", **(headers or {})},
            )
        try:
            connection.request(method, path, body, headers or {})
        except BaseException:
            connection.close()
            raise
        return connection

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
        """Until `condition`: some things happen after a client has seen its answer."""
        pause = threading.Event()
        for _ in range(int(seconds / 0.01)):
            if condition():
                return
            pause.wait(0.01)
        raise AssertionError(f"waited in vain: {what}")


@contextlib.contextmanager
def loopback(app: Any, kind: type[Loopback] = Loopback) -> Iterator[Any]:
    """The signal that would stop it is replaced by a call, `stop`."""
    listener = bind("127.0.0.1", 0)
    ready, done, stops = threading.Event(), threading.Event(), []

    def thread() -> None:
        try:
            asyncio.run(serve(app, listener, on_ready=ready.set, stops=stops))
        finally:
            done.set()
            ready.set()

    worker = threading.Thread(target=thread, daemon=True)
    worker.start()
    assert ready.wait(30) and not done.is_set(), "the server did not start"
    server = kind(listener.getsockname()[1], app, lambda: stops[0]("a test"), done)
    try:
        yield server
    finally:
        with contextlib.suppress(RuntimeError):  # it may have stopped already
            server.stop()
        worker.join(60)
        assert not worker.is_alive(), "the server did not stop"
