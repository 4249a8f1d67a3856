"""A model server as a process: the port first, the models behind it, one line when they are
ready."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from rlm_runtime.errors import UsageError
from rlm_runtime.serve.http.server import bind, log_to_stderr, serve, url_of
from rlm_runtime.serve.http.settings import is_loopback
from rlm_runtime.serve.model.app import create_app
from rlm_runtime.serve.model.backend import ModelBackend, ModelRegistry
from rlm_runtime.serve.model.settings import ModelSettings


def run_server(
    load: Callable[[], Sequence[ModelBackend]],
    settings: ModelSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    say: Callable[[str], None] = print,
    began: float | None = None,
    allow_no_key: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `began`: `time.monotonic()` of the start, for the
    line that says how long it took.

    Raises UsageError (the address cannot be had, or would be open to others without a key), or what
    `load` raised.
    """
    if not is_loopback(host) and not settings.api_keys and not allow_no_key:
        raise UsageError(
            f"--host {host} can be reached from other machines: give keys with --api_key_file, or say --allow_no_key."
        )
    began = time.monotonic() if began is None else began
    listener = bind(host, port)
    log_to_stderr()
    url = url_of(listener)

    async def main() -> None:
        stops: list[Callable[[str], None]] = []

        def on_loaded(registry: ModelRegistry) -> None:
            if registry.failure is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                    stops[0]("loading failed")
                return
            key = "" if settings.api_keys else " (no key needed)"
            say(
                f"ready: {', '.join(registry.models)} at {url}{key}, {time.monotonic() - began:.1f} s after the start"
            )

        def load_once_up() -> Sequence[ModelBackend]:
            up.wait()  # what fails at once must find the server there to stop it
            return load()

        def on_up() -> None:
            say(f"listening at {url}; loading the models")
            up.set()

        up = threading.Event()
        app = create_app(load_once_up, settings, on_loaded=on_loaded)
        await serve(app, listener, on_ready=on_up, say=say, stops=stops)
        if app.state.registry.failure is not None:
            raise app.state.registry.failure
        if not app.state.registry.loaded.is_set():
            # Stopped while loading: the compiler works in a thread that an ordinary exit would tear
            # down under it.
            say("stopped before the models were loaded")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    asyncio.run(main())
