"""What every server here has around its own routes: request checks, probes, metrics, the OpenAPI
document, and errors in one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlm_runtime.serve.http.admission import Admission
from rlm_runtime.serve.http.errors import ApiError, on_api_error, on_crash, on_http_error
from rlm_runtime.serve.http.metrics import Metrics
from rlm_runtime.serve.http.middleware import RequestMiddleware
from rlm_runtime.serve.http.schemas import Status
from rlm_runtime.serve.http.settings import HttpSettings


def assemble(
    routes: Sequence[Route],
    *,
    settings: HttpSettings,
    admission: Admission,
    metrics: Metrics,
    requests_total: str,
    document: Callable[[], dict[str, Any]],
    lifespan: Callable[[Starlette], Any],
    check: Callable[[], None] = lambda: None,
    methods: Sequence[str] = ("GET", "POST"),
    exposed: Sequence[str] = ("X-Request-Id", "Retry-After"),
) -> Starlette:
    """The application; `app.state.admission`, `.metrics` and `.settings` are its parts.

    Args:
      requests_total: name of the counter of HTTP requests, by route and status.
      document: the OpenAPI document, as of now.
      check: raises ApiError while the server is not healthy.
      methods, exposed: of web pages that may call: what they may ask, the headers they may read.
    """

    async def health(request: Request) -> Response:
        check()
        return reply(Status(status="ok"))

    async def ready(request: Request) -> Response:
        check()
        if admission.draining:
            raise ApiError(503, "The server is stopping.", code="draining")
        return reply(Status(status="ready"))

    async def show_metrics(request: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(request: Request) -> Response:
        return JSONResponse(document())

    def count(route: str, status: int) -> None:
        metrics.add(requests_total, route=route, status=str(status))

    common = {
        "/health": health,
        "/ready": ready,
        "/metrics": show_metrics,
        "/openapi.json": openapi,
    }
    middleware = [Middleware(RequestMiddleware, settings=settings, count=count)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=list(methods),
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=list(exposed),
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=[*routes, *(Route(path, endpoint) for path, endpoint in common.items())],
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_error,
            Exception: on_crash,
        },
    )
    app.router.redirect_slashes = False
    app.state.admission, app.state.metrics, app.state.settings = admission, metrics, settings
    return app


def reply(model: BaseModel) -> Response:
    """200 with this body."""
    return JSONResponse(model.model_dump())
