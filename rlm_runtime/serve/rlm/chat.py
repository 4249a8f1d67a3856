"""POST /v1/chat/completions: one run of an RLM for each request, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from rlm_runtime.errors import Cancelled
from rlm_runtime.rlm.results import RLMResult
from rlm_runtime.serve.http.admission import Admission
from rlm_runtime.serve.http.endpoint import Endpoint, Exchange, event, json_body
from rlm_runtime.serve.http.errors import from_validation, no_such_model
from rlm_runtime.serve.http.files import FileStore
from rlm_runtime.serve.http.metrics import Metrics
from rlm_runtime.serve.rlm.answer import answer_text, report, usage_out
from rlm_runtime.serve.rlm.conversation import Task, build
from rlm_runtime.serve.rlm.progress import Progress, line
from rlm_runtime.serve.rlm.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    RunReport,
)
from rlm_runtime.serve.rlm.served import ServedModel
from rlm_runtime.serve.rlm.settings import ServeSettings

LARGE = 1 << 20  # bytes of a body that is parsed beside the event loop
PIECE = 400  # characters of an answer in one streamed chunk
NOTES = 1_000  # progress notes kept for a client that reads too slowly; the oldest are dropped


class ChatEndpoint(Endpoint):
    def __init__(
        self,
        models: Mapping[str, ServedModel],
        settings: ServeSettings,
        *,
        admission: Admission,
        files: FileStore,
        metrics: Metrics,
    ) -> None:
        super().__init__(
            "chat_completions", "rlm_", settings=settings, admission=admission, metrics=metrics
        )
        self.models, self.settings, self.files = models, settings, files

    @contextlib.asynccontextmanager
    async def exchange(self, request: Request) -> AsyncIterator[ChatRun]:
        body = await json_body(request)
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
        chat.check()
        yield ChatRun(self, model, chat, owner=request.scope.get("rlm.owner", ""))


class ChatRun(Exchange[RLMResult]):
    """A request that was understood, and its run."""

    def __init__(
        self, endpoint: ChatEndpoint, model: ServedModel, request: ChatRequest, *, owner: str
    ) -> None:
        super().__init__()
        self.request, self.model, self.owner = request, model, owner
        self.budget, self.depth = model.bounds(request)
        self.id, self.created = "chatcmpl-" + secrets.token_hex(16), int(time.time())
        self.run = ""  # id of the run, once it has begun
        self.stream = bool(request.stream)
        self._settings, self._metrics = endpoint.settings, endpoint.metrics
        self._admission, self._files = endpoint.admission, endpoint.files
        self._notes: deque[dict[str, Any]] = deque(maxlen=NOTES)
        self._progress = Progress()
        self._loop = asyncio.get_running_loop()

    # ---- running

    async def work(self) -> RLMResult:
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="rlm-request-"))
        outcome = "error"
        try:
            async with self._admission.place() as waited:
                self._metrics.observe("rlm_request_queue_time_seconds", waited)
                began = time.monotonic()
                try:
                    task = await asyncio.to_thread(self._task, folder)
                    rlm = self.model.build(
                        self.request,
                        log_dir=self._settings.log_dir,
                        on_event=self._hear,
                        budget=self.budget,
                        depth=self.depth,
                    )
                    result = await rlm.acompletion(
                        task.context, task.question, output=self.request.answer_schema()
                    )
                    outcome = result.stop_reason.replace(":", "_")
                    self._count(result)
                finally:
                    self._metrics.observe(
                        "rlm_e2e_request_latency_seconds", time.monotonic() - began
                    )
            if result.stop_reason == "cancelled":
                raise Cancelled("The run was cancelled.")
            return result
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self._metrics.add("rlm_requests_total", finished_reason=outcome)
            await asyncio.shield(asyncio.to_thread(shutil.rmtree, folder, True))

    def _task(self, folder: Path) -> Task:
        """Blocking. An upload is linked into the request's folder: deleting it does not hurt a run
        that reads it."""

        def find(file_id: str) -> tuple[Path, str]:
            stored = self._files.get(file_id, self.owner)
            mine = folder / stored.id / stored.path.name
            if not mine.exists():
                mine.parent.mkdir(mode=0o700)
                try:
                    os.link(stored.path, mine)
                except OSError:
                    return stored.path, stored.name
            return mine, stored.name

        return build(
            self.request, folder=folder, find=find, question_chars=self._settings.question_chars
        )

    def _count(self, result: RLMResult) -> None:
        self._metrics.add("rlm_prompt_tokens_total", result.usage.input_tokens)
        self._metrics.add("rlm_generation_tokens_total", result.usage.output_tokens)
        self._metrics.add("rlm_model_calls_total", result.usage.calls)
        self._metrics.add("rlm_cost_usd_total", result.cost_usd or 0.0)

    def _hear(self, event: Any) -> None:
        """`on_event` of the run; may come from any thread."""
        self._loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Any) -> None:
        if event.type == "run_start" and not self.run:
            self.run = event.run
            self.changed.set()
        if (note := self._progress.note(event)) is not None:
            self._notes.append(note)
            self.changed.set()

    # ---- answering

    def begun(self) -> bool:
        return bool(self.run)

    def headers(self) -> dict[str, str]:
        return {"X-RLM-Run": self.run} if self.run else {}

    def whole(self, result: RLMResult) -> ChatCompletion:
        text, finish = answer_text(self.request, result)
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model.name,
            choices=[Choice(message=AnswerMessage(content=text), finish_reason=finish)],
            usage=usage_out(result, text),
            rlm=self._report(result),
        )

    def opening(self) -> str:
        return self._chunk({"role": "assistant", "content": ""})

    def news(self) -> str:
        options = self.request.rlm
        mode = (options.progress if options else None) or self._settings.progress
        parts = []
        while self._notes:
            note = self._notes.popleft()
            if mode == "field":
                parts.append(self._chunk({}, rlm={"progress": note}))
            elif mode == "reasoning":
                parts.append(self._chunk({"reasoning_content": line(note) + "\n"}))
            elif mode == "comment":
                parts.append(f": {line(note)}\n\n")
        return "".join(parts)

    def closing(self, result: RLMResult) -> Iterator[str]:
        text, finish = answer_text(self.request, result)
        for start in range(0, len(text), PIECE):
            yield self._chunk({"content": text[start : start + PIECE]})
        run_report = self._report(result).model_dump()
        if not self.request.usage_wanted:
            yield self._chunk({}, finish, rlm=run_report)
            return
        yield self._chunk({}, finish)
        yield event(
            {
                **self._head(),
                "choices": [],
                "usage": usage_out(result, text).model_dump(),
                "rlm": run_report,
            }
        )

    def _report(self, result: RLMResult) -> RunReport:
        return report(self.request, self.budget, self.depth, result, self.run)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model.name,
        }

    def _chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.request.usage_wanted else {}
        return event({**self._head(), "choices": [choice], **usage, **more})
