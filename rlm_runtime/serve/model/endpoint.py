"""POST /v1/completions and /v1/chat/completions: read, plan, run, answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from rlm_runtime.serve.http.admission import Admission
from rlm_runtime.serve.http.endpoint import Endpoint, Exchange, event, json_body
from rlm_runtime.serve.http.errors import ApiError, from_validation, no_such_model, refuse
from rlm_runtime.serve.model.backend import ModelBackend, ModelRegistry
from rlm_runtime.serve.model.metrics import ModelMetrics
from rlm_runtime.serve.model.plan import RequestPlan
from rlm_runtime.serve.model.run import RequestRun
from rlm_runtime.serve.model.sequence import Mailbox, Sequence
from rlm_runtime.serve.model.settings import ModelSettings
from rlm_runtime.serve.model.shapes import Shape

B = TypeVar("B", bound=BaseModel)

PROMPT = "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; no list may be empty."
MAX_IGNORED, MAX_NAME = 50, 64  # names of unknown fields that a reply lists, and characters of each
LARGE = 16 << 10  # bytes of a body that is parsed and encoded beside the event loop


class ModelEndpoint(Endpoint):
    def __init__(
        self,
        shape: Shape,
        registry: ModelRegistry,
        settings: ModelSettings,
        *,
        admission: Admission,
        metrics: ModelMetrics,
        mailbox: Callable[[], Mailbox],
    ) -> None:
        super().__init__(
            shape.name, "mor_jax:", settings=settings, admission=admission, metrics=metrics
        )
        self.shape, self.registry, self.settings = shape, registry, settings
        self._metrics, self._mailbox = metrics, mailbox

    def check(self) -> None:
        self.registry.check()

    @contextlib.asynccontextmanager
    async def exchange(self, request: Request) -> AsyncIterator[Generation]:
        plan = await self._read(request)
        async with self.admission.place():
            run = RequestRun(plan, self._mailbox(), self._metrics, self.settings)
            await run.submit()
            try:
                yield Generation(run, self.shape)
            finally:
                # the request holds its place until its lanes are free
                await asyncio.shield(run.leave())

    async def _read(self, request: Request) -> RequestPlan:
        body = await json_body(request)

        def understand() -> RequestPlan:
            asked = parsed(self.shape.request, body)
            plan = self.shape.plan(asked, find(self.registry, asked.model), self.settings)
            unknown = tuple(sorted(name[:MAX_NAME] for name in asked.model_extra or ()))
            return dataclasses.replace(plan, ignored=unknown[:MAX_IGNORED]) if unknown else plan

        # A grammar takes a while to compile, too.
        beside = len(body) > LARGE or b'"guided_' in body or b'"response_format"' in body
        return await asyncio.to_thread(understand) if beside else understand()


class Generation(Exchange[None]):
    """A run in one of OpenAI's shapes."""

    def __init__(self, run: RequestRun, shape: Shape) -> None:
        super().__init__()
        self.run, self.shape, self.stream = run, shape, run.plan.stream
        self.changed = run.changed
        self._identity, self._created = shape.prefix + secrets.token_hex(16), int(time.time())
        # choices that have not been closed
        self._open: dict[int, Sequence] = dict(enumerate(run.sequences))

    async def work(self) -> None:
        await self.run.wait()

    def whole(self, result: None) -> BaseModel:
        return self.shape.whole(self.run, self._identity)

    def opening(self) -> str:
        openings = (self.shape.opening(index) for index in self._open)
        return "".join(self._chunk(choice) for choice in openings if choice is not None)

    def news(self) -> str:
        """Chunks of what came since the last time; choices that have ended are closed and taken
        out."""
        parts = []
        for index, sequence in list(self._open.items()):
            text, scores = sequence.pull()
            if text or scores:
                parts.append(self._chunk(self.shape.piece(self.run, index, text, scores)))
            if sequence.finish is not None and sequence.ended in ("stop", "length", "deadline"):
                parts.append(self._chunk(self.shape.closing(self.run, index, sequence)))
                del self._open[index]
        return "".join(parts)

    def closing(self, result: None) -> Iterator[str]:
        if self.run.plan.usage_wanted:
            yield event({**self._head(), "choices": [], "usage": self.run.usage().model_dump()})

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._identity,
            "object": self.shape.chunk_object,
            "created": self._created,
            "model": self.run.plan.model.name,
        }

    def _chunk(self, choice: dict[str, Any]) -> str:
        usage = {"usage": None} if self.run.plan.usage_wanted else {}
        return event({**self._head(), "choices": [choice], **usage})


# ---- pieces


def parsed(kind: type[B], body: bytes) -> B:
    """The request, checked. Raises ApiError (400)."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        if all(
            e["loc"][:1] == ("prompt",) and len(e["loc"]) > 1
            for e in error.errors(include_input=False)
        ):
            # of four forms, which was meant?
            raise refuse(PROMPT, "prompt", "invalid_type_or_value") from None
        raise from_validation(error) from None


def find(registry: ModelRegistry, name: str | None) -> ModelBackend:
    """The model of this name; without one the only model there is. Raises ApiError."""
    if name is None and len(registry.models) == 1:
        return next(iter(registry.models.values()))
    if name is None:
        raise ApiError(
            400,
            f"model is missing; there are: {', '.join(registry.models)}.",
            param="model",
            code="missing_required_parameter",
        )
    if name not in registry.models:
        raise no_such_model(name, registry.models)
    return registry.models[name]
