"""The ASGI application of `rlm serve`: its routes and its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlm_runtime.serve.http.admission import Admission
from rlm_runtime.serve.http.app import assemble, reply
from rlm_runtime.serve.http.errors import no_such_model
from rlm_runtime.serve.http.files import FileStore, file_routes
from rlm_runtime.serve.http.metrics import Metrics
from rlm_runtime.serve.http.schemas import ModelOut
from rlm_runtime.serve.rlm.chat import ChatEndpoint
from rlm_runtime.serve.rlm.openapi import document
from rlm_runtime.serve.rlm.schemas import ModelList
from rlm_runtime.serve.rlm.served import ServedModel
from rlm_runtime.serve.rlm.settings import ServeSettings

SWEEP_SECONDS = 60.0


def create_app(models: Sequence[ServedModel], settings: ServeSettings | None = None) -> Starlette:
    """The server as an ASGI application; `app.state.admission`, `.files` and `.metrics` are its
    parts.

    The language models stay the caller's: they are not closed when the application ends.
    """
    settings = settings or ServeSettings()
    by_name = {model.name: model for model in models}
    if len(by_name) != len(models) or not models:
        raise ValueError("Models need names that differ, and there must be one at least.")
    created, described = int(time.time()), document(list(by_name))
    metrics = make_metrics()
    admission = Admission(settings.max_runs, settings.max_queue, settings.queue_seconds)
    files = FileStore(
        settings.files_dir,
        one=settings.file_bytes,
        all_=settings.files_bytes,
        per_owner=settings.files_per_key,
        seconds=settings.file_seconds,
    )
    metrics.gauge("rlm_num_requests_running", "Runs going on.", lambda: admission.running)
    metrics.gauge(
        "rlm_num_requests_waiting", "Requests waiting for a place.", lambda: admission.waiting
    )
    metrics.gauge("rlm_files_bytes", "Bytes of uploaded files.", lambda: files.used)

    async def list_models(request: Request) -> Response:
        return reply(ModelList(data=[ModelOut(id=name, created=created) for name in by_name]))

    async def get_model(request: Request) -> Response:
        name = request.path_params["model"]
        if name not in by_name:
            raise no_such_model(name, by_name)
        return reply(ModelOut(id=name, created=created))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            admission.cancel_all()
            await asyncio.to_thread(files.close)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await asyncio.to_thread(files.sweep)

    chat = ChatEndpoint(by_name, settings, admission=admission, files=files, metrics=metrics)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", get_model),
        *file_routes(files, admission),
    ]
    app = assemble(
        routes,
        settings=settings,
        admission=admission,
        metrics=metrics,
        requests_total="rlm_http_requests_total",
        document=lambda: described,
        lifespan=lifespan,
        methods=("GET", "POST", "DELETE"),
        exposed=("X-Request-Id", "X-RLM-Run", "Retry-After"),
    )
    app.state.files = files
    return app


def make_metrics() -> Metrics:
    metrics = Metrics()
    metrics.counter(
        "rlm_http_requests_total", "HTTP requests answered, by route and status.", "route", "status"
    )
    metrics.counter("rlm_requests_total", "Runs ended, by outcome.", "finished_reason")
    metrics.counter("rlm_rejected_total", "Runs refused before they began, by reason.", "reason")
    metrics.counter("rlm_disconnects_total", "Runs cancelled because the client went away.")
    metrics.counter("rlm_prompt_tokens_total", "Prompt tokens over the whole trees of all runs.")
    metrics.counter(
        "rlm_generation_tokens_total", "Generated tokens over the whole trees of all runs."
    )
    metrics.counter("rlm_model_calls_total", "Model calls over the whole trees of all runs.")
    metrics.counter("rlm_cost_usd_total", "Dollars spent, where prices are known.")
    metrics.histogram("rlm_e2e_request_latency_seconds", "From admission to the end of a run.")
    metrics.histogram("rlm_request_queue_time_seconds", "Waiting for a free place.")
    return metrics
