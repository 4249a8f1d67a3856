"""Runs the application in uvicorn, with a time limit for request headers and draining at a stop
signal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlm_runtime.errors import UsageError
from rlm_runtime.serve.http.settings import HttpSettings


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn's own handling closes the port at once and ends the process by the
    signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def protocol(settings: HttpSettings) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with two bounds it lacks: the time a head may take, and the number of
    connections."""

    class Bounded(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.abort()
                return
            self._timer = self.loop.call_later(settings.header_seconds, self._no_head)

        def data_received(self, data: bytes) -> None:
            if self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._timer = self.loop.call_later(settings.header_seconds, self._no_head)
            super().data_received(data)
            if (
                self._timer is not None
                and self.cycle is not None
                and not self.cycle.response_complete
            ):
                self._stop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _no_head(self) -> None:
            self._timer = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Bounded


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError where the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except OSError as error:
        raise UsageError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. Choose another --port."
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Base URL of what is served there, up to /v1."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    for library in ("httpx", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)


async def serve(
    app: Starlette,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
    stops: list[Callable[[str], None]] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain: new requests get 503, running ones may finish for
    `drain_seconds` and are then cancelled. A second signal cancels them at once.

    A list given as `stops` gets the function that stops the server, for any thread to call; in a
    thread, where signals do not arrive, it is the only way.
    """
    settings: HttpSettings = app.state.settings
    admission = app.state.admission
    config = uvicorn.Config(
        app,
        http=protocol(settings),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    stopping: list[asyncio.Task[None]] = []

    def stop(name: str) -> None:
        if stopping:
            say(f"{name} again: cancelling what runs")
            admission.cancel_all()
            return
        say(
            f"{name}: stopping; {admission.running} running, at most {settings.drain_seconds:g} s more"
        )
        stopping.append(loop.create_task(drain()))

    def stop_soon(name: str) -> None:
        loop.call_soon_threadsafe(stop, name)

    async def drain() -> None:
        try:
            if not await admission.drain(settings.drain_seconds):
                say("runs that were not done have been cancelled")
        finally:
            server.should_exit = True

    on_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGINT) if on_main else ()
    for number in signals:
        loop.add_signal_handler(number, stop, number.name)
    if stops is not None:
        stops.append(stop_soon)
    try:
        running = loop.create_task(server.serve(sockets=[listener]))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if server.started:
            on_ready()
        await running
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
        listener.close()
