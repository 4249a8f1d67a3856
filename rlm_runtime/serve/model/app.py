"""The ASGI application of a model server: its routes and its lifespan."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from rlm_runtime.serve.http.admission import Admission
from rlm_runtime.serve.http.app import assemble, reply
from rlm_runtime.serve.http.endpoint import json_body
from rlm_runtime.serve.http.errors import ApiError, refuse
from rlm_runtime.serve.http.openapi import version
from rlm_runtime.serve.model import schemas as s
from rlm_runtime.serve.model.backend import ModelBackend, ModelRegistry
from rlm_runtime.serve.model.endpoint import LARGE, ModelEndpoint, find, parsed
from rlm_runtime.serve.model.metrics import ModelMetrics
from rlm_runtime.serve.model.openapi import document
from rlm_runtime.serve.model.plan import chat_ids
from rlm_runtime.serve.model.sequence import Mailbox
from rlm_runtime.serve.model.settings import ModelSettings
from rlm_runtime.serve.model.shapes import ChatShape, CompletionShape, Shape, shown_all

B = TypeVar("B", bound=BaseModel)


def create_app(
    load: Callable[[], Sequence[ModelBackend]],
    settings: ModelSettings | None = None,
    *,
    on_loaded: Callable[[ModelRegistry], None] = lambda registry: None,
) -> Starlette:
    """The server as an ASGI application; `app.state.registry`, `.admission`, `.metrics` and
    `.mailbox` are its parts.

    `load` loads and warms up the models, in a thread, once the application starts: until then
    everything but /metrics and /openapi.json answers 503. `on_loaded` is called after it, in that
    thread; `registry.failure` says how it went. The engines are closed when the application ends.
    """
    settings = settings or ModelSettings()
    registry, created = ModelRegistry(), int(time.time())
    metrics = ModelMetrics(lambda: registry.models.values())
    admission = Admission(settings.max_runs, settings.max_queue, settings.queue_seconds)
    metrics.gauge(
        "mor_jax:open_requests",
        "Requests inside: reading, waiting or running.",
        lambda: admission.running,
    )
    metrics.gauge(
        "mor_jax:asyncio_tasks", "Tasks of the event loop; back to a few when idle.", _tasks
    )

    async def list_models(request: Request) -> Response:
        registry.check()
        return reply(
            s.ServedModelList(data=[_model_out(m, created) for m in registry.models.values()])
        )

    async def get_model(request: Request) -> Response:
        registry.check()
        return reply(_model_out(find(registry, request.path_params["model"]), created))

    async def tokenize(request: Request) -> Response:
        asked = await read(s.TokenizeRequest, request)
        model = find(registry, asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise refuse("Give either prompt or messages.", "prompt")
        long = len(asked.prompt or "") > LARGE or asked.messages is not None

        def encode() -> list[int]:
            if asked.messages is not None:
                return chat_ids(asked.messages, model, settings, asked.add_generation_prompt, None)
            prompt = asked.prompt or ""
            if len(prompt) > settings.max_prompt_chars:
                raise ApiError(
                    413,
                    f"prompt is longer than {settings.max_prompt_chars:,} characters.",
                    param="prompt",
                )
            # how a client finds out the ids of tokens it must place itself
            if prompt in model.tokenizer.specials:
                return [model.tokenizer.specials[prompt]]
            if asked.add_special_tokens is False:
                return model.tokenizer.encode(prompt)
            return model.tokenizer.prompt(prompt)

        ids = await asyncio.to_thread(encode) if long else encode()
        words = shown_all(model.tokenizer, ids) if asked.return_token_strs else None
        return reply(
            s.Tokenized(count=len(ids), max_model_len=model.window, tokens=ids, token_strs=words)
        )

    async def detokenize(request: Request) -> Response:
        asked = await read(s.DetokenizeRequest, request)
        model = find(registry, asked.model)
        if asked.tokens and max(asked.tokens) >= model.tokenizer.vocab_size:
            raise refuse(
                f"This model's vocabulary has {model.tokenizer.vocab_size} tokens.", "tokens"
            )
        return reply(s.Detokenized(prompt=model.tokenizer.decode(asked.tokens)))

    async def tokenizer_info(request: Request) -> Response:
        registry.check()
        model = find(registry, request.query_params.get("model") or next(iter(registry.models)))
        t = model.tokenizer
        bos, eos = t.token_text(t.bos), t.token_text(t.eos)
        return reply(
            s.TokenizerInfo(
                tokenizer_class=type(t).__name__,
                vocab_size=t.vocab_size,
                bos_token=bos,
                eos_token=eos,
                eot_token=eos,
                bos_token_id=t.bos,
                eos_token_id=t.eos,
                model_max_length=model.window,
                chat_template=model.template.source,
            )
        )

    async def read(kind: type[B], request: Request) -> B:
        registry.check()
        try:
            with admission.entrance():
                body = await json_body(request)
                return (
                    await asyncio.to_thread(parsed, kind, body)
                    if len(body) > LARGE
                    else parsed(kind, body)
                )
        except ClientDisconnect:
            raise ApiError(400, "The client went away.", code="disconnected") from None

    async def show_version(request: Request) -> Response:
        return reply(s.Version(version=version()))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.mailbox = Mailbox(asyncio.get_running_loop())

        def fill() -> None:
            registry.fill(load)
            on_loaded(registry)

        # Not a worker of the loop: a server that is stopped while it loads does not wait for it.
        threading.Thread(target=fill, name="load models", daemon=True).start()
        try:
            yield
        finally:
            admission.cancel_all()
            await asyncio.to_thread(registry.close)

    def endpoint_of(shape: Shape) -> ModelEndpoint:
        return ModelEndpoint(
            shape, registry, settings, admission=admission, metrics=metrics, mailbox=mailbox
        )

    shapes: dict[str, Shape] = {
        "/v1/completions": CompletionShape(),
        "/v1/chat/completions": ChatShape(),
    }

    def mailbox() -> Mailbox:
        box: Mailbox = app.state.mailbox
        return box

    routes = [
        *(Route(path, endpoint_of(shape), methods=["POST"]) for path, shape in shapes.items()),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", get_model),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/version", show_version),
    ]
    app = assemble(
        routes,
        settings=settings,
        admission=admission,
        metrics=metrics,
        requests_total="mor_jax:http_requests_total",
        document=lambda: document(list(registry.models)),
        lifespan=lifespan,
        check=registry.check,
    )
    app.state.registry = registry
    return app


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # read from outside the loop
        return 0


def _model_out(model: ModelBackend, created: int) -> s.ServedModelOut:
    return s.ServedModelOut(id=model.name, created=created, max_model_len=model.window)
