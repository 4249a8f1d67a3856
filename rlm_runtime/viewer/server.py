"""The page over HTTP: read-only, loopback, for one folder."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlm_runtime.errors import UsageError
from rlm_runtime.viewer import assets
from rlm_runtime.viewer.data import Library, dumps

if TYPE_CHECKING:
    from starlette.applications import Starlette

KINDS = {"css": "text/css", "js": "text/javascript", "html": "text/html"}
HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::\d*)?")
HEADERS = {
    "Content-Security-Policy": assets.policy("'self'", "'self'", "'self'")
    + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def make_app(path: Path | str, host: str = "127.0.0.1") -> Starlette:
    """The ASGI application for a run file, a run folder or a folder of runs. Raises UsageError
    where there is none."""
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import Response
        from starlette.routing import Route
    except ImportError as error:
        raise UsageError(
            "The viewer needs starlette and uvicorn: in a checkout of this project, pip install '.[serve]'."
        ) from error
    library = Library(path)
    pages = {"/": "page.html"} | {f"/{name}": name for name in (assets.STYLE, *assets.SCRIPTS)}

    def answer(content: str, kind: str, status: int = 200) -> Response:
        # The charset belongs to the type: without it a browser may guess one.
        return Response(content.encode(), status, HEADERS, f"{kind}; charset=utf-8")

    async def page(request: Any) -> Response:
        name = pages[request.url.path]
        return answer(
            _page() if name == "page.html" else assets.text(name), KINDS[name.rpartition(".")[2]]
        )

    async def api(request: Any) -> Response:
        query = request.query_params
        try:
            body = await run_in_threadpool(_ask, library, request.path_params["what"], query)
        except UsageError as error:
            return answer(dumps({"error": str(error)}), "application/json", 404)
        except (OSError, ValueError) as error:
            return answer(dumps({"error": str(error)}), "application/json", 400)
        return answer(body, "application/json")

    routes = [Route(where, page, methods=["GET"]) for where in pages]
    app = Starlette(routes=[*routes, Route("/api/{what}", api, methods=["GET"])])
    return _HostCheck(app, host)  # type: ignore[return-value]


def _page() -> str:
    tags = "\n".join(f'<script src="{name}"></script>' for name in assets.SCRIPTS)
    page = assets.text("page.html").replace("<!-- scripts -->", tags)
    return page.replace("<!-- style -->", f'<link rel="stylesheet" href="{assets.STYLE}">')


def _ask(library: Library, what: str, query: Any) -> str:
    if what == "runs":
        return dumps({"runs": library.listing(), "single": library.path.is_file()})
    run = library.run(query.get("run", ""))
    match what:
        case "events":
            return run.since(_number(query, "from"))
        case "event":
            return dumps(run.whole(_number(query, "number")))
        case "search":
            words = query.get("words", "")[:500]
            return dumps(run.search(words) if words.strip() else {"hits": [], "more": False})
    raise UsageError(f"No such question: {what!r}.")


def _number(query: Any, name: str) -> int:
    text = query.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ValueError(f"{name} must be a whole number.")
    return int(text)


class _HostCheck:
    """Refuses a request whose Host is not ours: a page elsewhere that points its own name at this
    machine (DNS rebinding) would otherwise read the runs."""

    def __init__(self, app: Any, host: str):
        self.app = app
        self.names = {"localhost", host.strip("[]").lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        hosts = [
            value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"
        ]
        if scope["type"] == "http" and not (len(hosts) == 1 and self.knows(hosts[0])):
            headers = [
                (b"content-type", b"text/plain; charset=utf-8"),
                (b"x-content-type-options", b"nosniff"),
            ]
            await send({"type": "http.response.start", "status": 421, "headers": headers})
            await send(
                {
                    "type": "http.response.body",
                    "body": b"This server answers to its own address only.\n",
                }
            )
            return
        await self.app(scope, receive, send)

    def knows(self, host: str) -> bool:
        match = HOST.fullmatch(host)
        name = (match[1] or match[2]).lower() if match else ""
        return name in self.names or _is_loopback(name)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def _server(path: Path | str, host: str, port: int) -> tuple[Any, socket.socket, str]:
    if not _is_loopback(host):
        raise UsageError(
            f"The viewer has no login, so it listens on this machine only, not on {host!r}. From elsewhere, forward "
            "the port (ssh -L) or send an exported page."
        )
    app = make_app(path, host)
    try:
        import uvicorn
    except ImportError as error:
        raise UsageError(
            "The viewer needs starlette and uvicorn: in a checkout of this project, pip install '.[serve]'."
        ) from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(128)  # from here on a connection waits instead of being refused
    except OSError as error:
        listener.close()
        raise UsageError(
            f"The viewer cannot listen on {host} port {port}: {error.strerror}. Try --port 0."
        ) from error
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    url = f"http://{shown}:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        app, log_level="warning", lifespan="off", access_log=False, timeout_graceful_shutdown=1
    )
    return uvicorn.Server(config), listener, url


def serve(
    path: Path | str,
    host: str = "127.0.0.1",
    port: int = 0,
    open_browser: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Show the run or runs at `path` until interrupted; `announce` gets the address. Port 0: any
    free one.

    Raises UsageError: no trajectory there, an address that is not loopback or not free, the extra
    not installed.
    """
    server, listener, url = _server(path, host, port)
    announce(url)
    if open_browser:
        threading.Timer(0.3, webbrowser.open, [url]).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    listener.close()


@contextlib.contextmanager
def running(path: Path | str, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve in a thread of this process for the length of a `with`; gives the address. Raises as
    `serve` does."""
    server, listener, url = _server(path, host, port)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listener]}, name="rlm-viewer", daemon=True
    )
    thread.start()
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
