"""POST /v1/chat/completions: one run of an RLM for each request, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rlm_runtime.budget import Budget
from rlm_runtime.errors import Cancelled
from rlm_runtime.serve.admission import Admission
from rlm_runtime.serve.answered import answer_text, report, usage_out
from rlm_runtime.serve.asked import check, no_such_model, schema_of
from rlm_runtime.serve.conversation import Task, build
from rlm_runtime.serve.engine import ServedModel
from rlm_runtime.serve.errors import ApiError, from_run, from_validation
from rlm_runtime.serve.files import FileStore
from rlm_runtime.serve.metrics import Metrics
from rlm_runtime.serve.progress import Progress, line
from rlm_runtime.serve.schemas import AnswerMessage, ChatCompletion, ChatRequest, Choice
from rlm_runtime.serve.settings import ServeSettings

log = logging.getLogger("rlm_runtime.serve")

LARGE = 1 << 20  # bytes of a body that is parsed beside the event loop
PIECE = 400  # characters of an answer in one streamed chunk


@dataclass(frozen=True)
class Job:
    """A request that was understood."""

    request: ChatRequest
    model: ServedModel
    budget: Budget
    depth: int
    owner: str
    id: str
    created: int


class Outbox:
    """Notes of a run on their way to the client; the oldest are dropped where it reads too slowly."""

    def __init__(self) -> None:
        self.notes: deque[dict[str, Any]] = deque(maxlen=1_000)
        self.run: str | None = None  # id of the run, once it has begun
        self.changed = asyncio.Event()
        self._progress = Progress()
        self._loop = asyncio.get_running_loop()

    def __call__(self, event: Any) -> None:
        """`on_event` of the run; may come from any thread."""
        self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Any) -> None:
        if event.type == "run_start" and self.run is None:
            self.run = event.run
            self.changed.set()
        if (note := self._progress.note(event)) is not None:
            self.notes.append(note)
            self.changed.set()


class ChatEndpoint:
    """An ASGI application, so that it sees disconnects itself."""

    __name__ = "chat_completions"

    def __init__(
        self, models: Mapping[str, ServedModel], settings: ServeSettings, admission: Admission, files: FileStore,
        metrics: Metrics,
    ):  # fmt: skip
        self.models, self.settings, self.admission = models, settings, admission
        self.files, self.metrics = files, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.admission.entrance():
                job = await self._read(Request(scope, receive))
                await self._answer(job, scope, receive, send)
        except ClientDisconnect:
            self.metrics.add("rlm_disconnects_total")
        except ApiError as error:
            if error.status in (429, 503):
                self.metrics.add("rlm_rejected_total", reason=error.code or str(error.status))
            raise

    # ---- reading

    async def _read(self, request: Request) -> Job:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "The body must be JSON, sent as Content-Type: application/json.",
                           code="unsupported_media_type", close=True)  # fmt: skip
        body = await request.body()
        try:
            if len(body) > LARGE:
                chat = await asyncio.to_thread(ChatRequest.model_validate_json, body)
            else:
                chat = ChatRequest.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error) from None
        model = self.models.get(chat.model)
        if model is None:
            raise no_such_model(chat.model, self.models)
        check(chat)
        budget, depth = model.bounds(chat)
        return Job(chat, model, budget, depth, request.scope.get("rlm.owner", ""),
                   "chatcmpl-" + secrets.token_hex(16), int(time.time()))  # fmt: skip

    # ---- running

    async def _answer(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the job beside a watch on the connection; whichever ends first decides."""
        outbox = Outbox()
        run = asyncio.create_task(self._run(job, outbox))
        gone = asyncio.create_task(disconnected(receive))
        self.admission.tasks.add(run)
        for task in (run, gone):
            task.add_done_callback(lambda _: outbox.changed.set())
        deliver = self._stream if job.request.stream else self._whole
        try:
            await deliver(job, run, gone, outbox, scope, receive, send)
        finally:
            self.admission.tasks.discard(run)
            gone.cancel()
            if not run.done():
                self.metrics.add("rlm_disconnects_total")
                run.cancel()
            # Not before the worker is gone does this request leave the building.
            await asyncio.wait({run, gone})
            if not run.cancelled():
                run.exception()  # seen

    async def _run(self, job: Job, outbox: Outbox) -> Any:
        """The RLM's result. Raises ApiError, or what the run raises."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="rlm-request-"))
        outcome = "error"
        try:
            async with self.admission.place() as waited:
                self.metrics.observe("rlm_request_queue_time_seconds", waited)
                began = time.monotonic()
                try:
                    task = await asyncio.to_thread(self._task, job, folder)
                    rlm = job.model.build(
                        job.request, log_dir=self.settings.log_dir, on_event=outbox, budget=job.budget, depth=job.depth
                    )
                    result = await rlm.acompletion(task.context, task.question, output=schema_of(job.request))
                    outcome = result.stop_reason.replace(":", "_")
                    self._count(result)
                finally:
                    self.metrics.observe("rlm_e2e_request_latency_seconds", time.monotonic() - began)
            if result.stop_reason == "cancelled":
                raise Cancelled("The run was cancelled.")
            return result
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.add("rlm_requests_total", finished_reason=outcome)
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))

    def _task(self, job: Job, folder: Path) -> Task:
        """Blocking. An upload is linked into the request's folder: deleting it does not hurt a run that reads it."""

        def find(file_id: str) -> tuple[Path, str]:
            stored = self.files.get(file_id, job.owner)
            mine = folder / stored.id / stored.path.name
            if not mine.exists():
                mine.parent.mkdir(mode=0o700)
                try:
                    os.link(stored.path, mine)
                except OSError:
                    return stored.path, stored.name
            return mine, stored.name

        return build(job.request, folder=folder, find=find, question_chars=self.settings.question_chars)

    def _count(self, result: Any) -> None:
        self.metrics.add("rlm_prompt_tokens_total", result.usage.input_tokens)
        self.metrics.add("rlm_generation_tokens_total", result.usage.output_tokens)
        self.metrics.add("rlm_model_calls_total", result.usage.calls)
        self.metrics.add("rlm_cost_usd_total", result.cost_usd or 0.0)

    # ---- answering

    async def _whole(
        self,
        job: Job,
        run: asyncio.Task,
        gone: asyncio.Task,
        outbox: Outbox,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        await asyncio.wait({run, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            return
        result = outcome(run)
        text, finish = answer_text(job.request, result)
        body = ChatCompletion(
            id=job.id, created=job.created, model=job.model.name,
            choices=[Choice(message=AnswerMessage(content=text), finish_reason=finish)],
            usage=usage_out(result, text), rlm=report(job.request, job.budget, job.depth, result, outbox.run),
        )  # fmt: skip
        response = JSONResponse(body.model_dump(), headers=run_header(outbox.run))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.send_seconds):
                await response(scope, receive, send)

    async def _stream(
        self,
        job: Job,
        run: asyncio.Task,
        gone: asyncio.Task,
        outbox: Outbox,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        # Until the run has begun, a failure still gets a status of its own.
        while not (run.done() or gone.done() or outbox.run):
            outbox.changed.clear()
            await outbox.changed.wait()
        if run.done():
            outcome(run)
        if gone.done():
            return
        options = job.request.rlm
        mode = (options.progress if options else None) or self.settings.progress
        usage_wanted = bool(job.request.stream_options and job.request.stream_options.include_usage)
        head = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": job.model.name}

        async def put(text: str) -> None:
            async with asyncio.timeout(self.settings.send_seconds):
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return event({**head, "choices": [choice], **({"usage": None} if usage_wanted else {}), **more})

        async def tell() -> None:
            while outbox.notes:
                note = outbox.notes.popleft()
                if mode == "field":
                    await put(chunk({}, rlm={"progress": note}))
                elif mode == "reasoning":
                    await put(chunk({"reasoning_content": line(note) + "\n"}))
                elif mode == "comment":
                    await put(f": {line(note)}\n\n")

        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no", **run_header(outbox.run)}  # fmt: skip
        raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        with contextlib.suppress(TimeoutError):  # the client stopped reading: as good as gone
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await put(chunk({"role": "assistant", "content": ""}))
            while not run.done():
                if gone.done():
                    return
                await tell()
                outbox.changed.clear()
                if run.done() or gone.done() or outbox.notes:
                    continue
                try:
                    async with asyncio.timeout(self.settings.keep_alive_seconds):
                        await outbox.changed.wait()
                except TimeoutError:
                    await put(": keep-alive\n\n")
            await asyncio.sleep(0)  # what the run told last is on its way
            await tell()
            try:
                result = outcome(run)
            except Exception as error:
                api = error if isinstance(error, ApiError) else from_run(error)
                await put(event(api.body()))
            else:
                text, finish = answer_text(job.request, result)
                for start in range(0, len(text), PIECE):
                    await put(chunk({"content": text[start : start + PIECE]}))
                run_report = report(job.request, job.budget, job.depth, result, outbox.run).model_dump()
                await put(chunk({}, finish, **({} if usage_wanted else {"rlm": run_report})))
                if usage_wanted:
                    usage = usage_out(result, text).model_dump()
                    await put(event({**head, "choices": [], "usage": usage, "rlm": run_report}))
            await put("data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b"", "more_body": False})


# ---- pieces


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def outcome(run: asyncio.Task) -> Any:
    """The result of a run that is done, or its error as an ApiError."""
    if run.cancelled():
        raise from_run(Cancelled())
    error = run.exception()
    if error is not None:
        raise from_run(error)
    return run.result()


def run_header(run: str | None) -> dict[str, str]:
    return {"X-RLM-Run": run} if run else {}


def event(data: dict[str, Any]) -> str:
    return "data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n\n"
