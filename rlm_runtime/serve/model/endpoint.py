"""POST /v1/completions and /v1/chat/completions: read, plan, run, answer; a client that goes away ends its run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rlm_runtime.serve.admission import Admission
from rlm_runtime.serve.asked import no_such_model
from rlm_runtime.serve.chat import disconnected, event
from rlm_runtime.serve.errors import ApiError, from_run, from_validation, refuse
from rlm_runtime.serve.model.backend import ModelBackend, ModelRegistry
from rlm_runtime.serve.model.metrics import ModelMetrics
from rlm_runtime.serve.model.plan import Plan
from rlm_runtime.serve.model.run import Run, error_of
from rlm_runtime.serve.model.sequence import Mailbox
from rlm_runtime.serve.model.settings import ModelSettings
from rlm_runtime.serve.model.shapes import Shape

PROMPT = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; no list may be empty."
MAX_IGNORED, MAX_NAME = 50, 64  # names of unknown fields that a reply lists, and characters of each
LARGE = 16 << 10  # bytes of a body that is parsed and encoded beside the event loop


class Endpoint:
    """An ASGI application, so that it sees disconnects itself."""

    def __init__(
        self, shape: Shape, registry: ModelRegistry, settings: ModelSettings, admission: Admission, metrics: ModelMetrics,
        mailbox: Callable[[], Mailbox],
    ):  # fmt: skip
        self.__name__ = shape.name  # the route's name in the metrics
        self.shape, self.registry, self.settings = shape, registry, settings
        self.admission, self.metrics, self.mailbox = admission, metrics, mailbox

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.registry.check()
            with self.admission.entrance():
                plan = await self._read(Request(scope, receive))
                async with self.admission.place():
                    await self._answer(plan, scope, receive, send)
        except ClientDisconnect:
            self.metrics.add("mor_jax:disconnects_total")
        except ApiError as error:
            if error.status in (429, 503):
                self.metrics.add("mor_jax:rejected_total", reason=error.code or str(error.status))
            raise

    async def _read(self, request: Request) -> Plan:
        body = await json_body(request)

        def understand() -> Plan:
            asked = parsed(self.shape.request, body)
            plan = self.shape.plan(asked, find(self.registry, asked.model), self.settings)
            unknown = tuple(sorted(name[:MAX_NAME] for name in asked.model_extra or ()))
            return dataclasses.replace(plan, ignored=unknown[:MAX_IGNORED]) if unknown else plan

        # A grammar takes a while to compile, too.
        beside = len(body) > LARGE or b'"guided_' in body or b'"response_format"' in body
        return await asyncio.to_thread(understand) if beside else understand()

    async def _answer(self, plan: Plan, scope: Scope, receive: Receive, send: Send) -> None:
        run = Run(plan, self.mailbox(), self.metrics, self.settings)
        await run.submit()
        work = asyncio.create_task(run.wait())
        gone = asyncio.create_task(disconnected(receive))
        self.admission.tasks.add(work)
        for task in (work, gone):
            task.add_done_callback(lambda _: run.changed.set())
        deliver = self._stream if plan.stream else self._whole
        try:
            await deliver(run, work, gone, scope, receive, send)
        finally:
            self.admission.tasks.discard(work)
            if not run.done:
                self.metrics.add("mor_jax:disconnects_total")
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
            await asyncio.shield(run.leave())  # not before its lanes are free does it leave the building

    async def _whole(
        self, run: Run, work: asyncio.Task, gone: asyncio.Task, scope: Scope, receive: Receive, send: Send
    ) -> None:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return
        if work.cancelled():
            raise stopping()
        run.check()
        reply = self.shape.whole(run, self._identity())
        response = JSONResponse(reply.model_dump())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.send_seconds):
                await response(scope, receive, send)

    async def _stream(
        self, run: Run, work: asyncio.Task, gone: asyncio.Task, scope: Scope, receive: Receive, send: Send
    ) -> None:
        head = {"id": self._identity(), "object": self.shape.chunk_object, "created": int(time.time()),
                "model": run.plan.model.name}  # fmt: skip
        more = {"usage": None} if run.plan.usage_wanted else {}

        async def put(text: str) -> None:
            async with asyncio.timeout(self.settings.send_seconds):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        def chunk(choice: dict[str, Any]) -> str:
            return event({**head, "choices": [choice], **more})

        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no"}  # fmt: skip
        raw = [(k.encode(), v.encode()) for k, v in headers.items()]
        with contextlib.suppress(TimeoutError):  # the client stopped reading: as good as gone
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            openings = [self.shape.opening(i) for i in range(len(run.sequences))]
            if text := "".join(chunk(o) for o in openings if o is not None):
                await put(text)
            open_choices = dict(enumerate(run.sequences))
            while open_choices:
                if gone.done():
                    return
                run.changed.clear()
                if text := self._news(run, open_choices, chunk):
                    await put(text)
                    continue
                if work.cancelled() or error_of(run):
                    break
                try:
                    async with asyncio.timeout(self.settings.keep_alive_seconds):
                        await run.changed.wait()
                except TimeoutError:
                    await put(": keep-alive\n\n")
            if error := stopping() if work.cancelled() and not run.done else error_of(run):
                await put(event(error.body()))
            elif run.plan.usage_wanted:
                await put(event({**head, "choices": [], "usage": run.usage().model_dump()}))
            await put("data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _news(self, run: Run, open_choices: dict[int, Any], chunk: Callable[[dict[str, Any]], str]) -> str:
        """Chunks of what came since the last time; choices that have ended are closed and taken out."""
        parts = []
        for index, sequence in list(open_choices.items()):
            text, scores = sequence.pull()
            if text or scores:
                parts.append(chunk(self.shape.piece(run, index, text, scores)))
            if sequence.finish is not None and sequence.ended in ("stop", "length", "deadline"):
                parts.append(chunk(self.shape.closing(run, index, sequence)))
                del open_choices[index]
        return "".join(parts)

    def _identity(self) -> str:
        return self.shape.prefix + secrets.token_hex(16)


# ---- pieces


async def json_body(request: Request) -> bytes:
    """Raises ApiError: 415, or 413 and 408 for a body that is too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON, sent as Content-Type: application/json.",
                       code="unsupported_media_type", close=True)  # fmt: skip
    return await request.body()


def parsed(kind: type[Any], body: bytes) -> Any:
    """The request, checked. Raises ApiError (400)."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if all(e["loc"][:1] == ("prompt",) and len(e["loc"]) > 1 for e in error.errors(include_input=False)):
            raise refuse(PROMPT, "prompt", "invalid_type_or_value") from None  # of four forms, which was meant?
        raise from_validation(error) from None


def find(registry: ModelRegistry, name: str | None) -> ModelBackend:
    """The model of this name; without one the only model there is. Raises ApiError."""
    if name is None and len(registry.models) == 1:
        return next(iter(registry.models.values()))
    if name is None:
        raise ApiError(400, f"model is missing; there are: {', '.join(registry.models)}.", param="model",
                       code="missing_required_parameter")  # fmt: skip
    if name not in registry.models:
        raise no_such_model(name, registry.models)
    return registry.models[name]


def stopping() -> ApiError:
    return from_run(ApiError(503, "The request was cancelled because the server is stopping.", code="cancelled"))
