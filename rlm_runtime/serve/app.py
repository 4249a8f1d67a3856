"""The ASGI application of `rlm serve`: its routes and its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from rlm_runtime.serve.admission import Admission
from rlm_runtime.serve.asked import no_such_model
from rlm_runtime.serve.assemble import assemble, reply
from rlm_runtime.serve.chat import ChatEndpoint
from rlm_runtime.serve.engine import ServedModel
from rlm_runtime.serve.errors import ApiError, refuse
from rlm_runtime.serve.files import FileStore, expiry, pieces
from rlm_runtime.serve.metrics import standard
from rlm_runtime.serve.openapi import document
from rlm_runtime.serve.schemas import FileDeleted, FileList, ModelList, ModelOut
from rlm_runtime.serve.settings import ServeSettings

SWEEP_SECONDS = 60.0


def create_app(models: Sequence[ServedModel], settings: ServeSettings | None = None) -> Starlette:
    """The server as an ASGI application; `app.state.admission`, `.files` and `.metrics` are its parts.

    The language models stay the caller's: they are not closed when the application ends.
    """
    settings = settings or ServeSettings()
    by_name = {model.name: model for model in models}
    if len(by_name) != len(models) or not models:
        raise ValueError("Models need names that differ, and there must be one at least.")
    created, described = int(time.time()), document(list(by_name))
    metrics = standard()
    admission = Admission(settings.max_runs, settings.max_queue, settings.queue_seconds)
    files = FileStore(
        settings.files_dir, one=settings.file_bytes, all_=settings.files_bytes, per_owner=settings.files_per_key,
        seconds=settings.file_seconds,
    )  # fmt: skip
    metrics.gauge("rlm_num_requests_running", "Runs going on.", lambda: admission.running)
    metrics.gauge("rlm_num_requests_waiting", "Requests waiting for a place.", lambda: admission.waiting)
    metrics.gauge("rlm_files_bytes", "Bytes of uploaded files.", lambda: files.used)

    async def list_models(request: Request) -> Response:
        return reply(ModelList(data=[ModelOut(id=name, created=created) for name in by_name]))

    async def get_model(request: Request) -> Response:
        name = request.path_params["model"]
        if name not in by_name:
            raise no_such_model(name, by_name)
        return reply(ModelOut(id=name, created=created))

    async def upload_file(request: Request) -> Response:
        if admission.draining:
            raise ApiError(503, "The server is stopping.", code="draining", headers={"Retry-After": "5"}, close=True)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise ApiError(415, "A file is uploaded as multipart/form-data.", code="unsupported_media_type", close=True)
        owner = request.scope.get("rlm.owner", "")
        declared = request.headers.get("content-length", "")
        files.check(owner, int(declared) if declared.isdigit() else None)
        async with request.form(max_files=1, max_fields=16) as form:
            upload = form.get("file")
            if upload is None or isinstance(upload, str):
                raise refuse("The form has no file in its field `file`.", "file", "missing_required_parameter")
            purpose = form.get("purpose", "user_data")
            if not isinstance(purpose, str) or not re.fullmatch(r"[\w.\-]{1,64}", purpose):
                raise refuse("purpose must be a short word such as user_data.", "purpose")
            seconds = expiry(_text(form, "expires_after[anchor]"), _text(form, "expires_after[seconds]"))
            stored = await asyncio.to_thread(
                files.add,
                upload.file,
                name=upload.filename or "file.txt",
                purpose=purpose,
                owner=owner,
                seconds=seconds,
            )
        return reply(stored.out())

    async def list_files(request: Request) -> Response:
        data = [f.out() for f in files.list(request.scope.get("rlm.owner", ""))]
        return reply(FileList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None))

    async def get_file(request: Request) -> Response:
        return reply(files.get(request.path_params["file_id"], request.scope.get("rlm.owner", "")).out())

    async def delete_file(request: Request) -> Response:
        file_id = request.path_params["file_id"]
        await asyncio.to_thread(files.delete, file_id, request.scope.get("rlm.owner", ""))
        return reply(FileDeleted(id=file_id))

    async def get_file_content(request: Request) -> Response:
        stored = files.get(request.path_params["file_id"], request.scope.get("rlm.owner", ""))
        headers = {
            "Content-Length": str(stored.bytes),
            "Content-Disposition": f'attachment; filename="{stored.path.name}"',
        }
        # Never as a type a browser would show: it is somebody's upload.
        return StreamingResponse(pieces(stored.path), media_type="application/octet-stream", headers=headers)

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

    chat = ChatEndpoint(by_name, settings, admission, files, metrics)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", get_model),
        Route("/v1/files", list_files),
        Route("/v1/files", upload_file, methods=["POST"]),
        Route("/v1/files/{file_id}", get_file),
        Route("/v1/files/{file_id}", delete_file, methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", get_file_content),
    ]
    app = assemble(
        routes, settings=settings, admission=admission, metrics=metrics, requests_total="rlm_http_requests_total",
        document=lambda: described, lifespan=lifespan, methods=("GET", "POST", "DELETE"),
        exposed=("X-Request-Id", "X-RLM-Run", "Retry-After"),
    )  # fmt: skip
    app.state.files = files
    return app


def _text(form: Any, name: str) -> str | None:
    value = form.get(name)
    return value if isinstance(value, str) else None
