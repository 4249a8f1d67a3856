"""One JSON request: read, run beside a watch on the connection, and answered whole or as
server-sent events.

An endpoint is an ASGI application, so that it sees disconnects itself: a client that goes away ends
its run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from rlm_runtime.errors import Cancelled
from rlm_runtime.serve.http.admission import Admission
from rlm_runtime.serve.http.errors import ApiError, from_run
from rlm_runtime.serve.http.metrics import Metrics
from rlm_runtime.serve.http.settings import HttpSettings

R = TypeVar("R")

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"


class Exchange(ABC, Generic[R]):
    """A request that was understood, and its answer. `work` makes a result, the other methods show
    it.

    `changed` is set by whoever has something new to show. All on the event loop.
    """

    stream: bool  # answer as server-sent events

    def __init__(self) -> None:
        self.changed = asyncio.Event()

    @abstractmethod
    async def work(self) -> R:
        """Runs the request; cancelled when the client goes away. Raises ApiError, or what
        `from_run` knows."""

    @abstractmethod
    def whole(self, result: R) -> BaseModel:
        """The body of an answer that is not streamed."""

    def begun(self) -> bool:
        """Whether a stream may open. Until then a failure gets a status of its own."""
        return True

    def headers(self) -> Mapping[str, str]:
        """More headers of the answer."""
        return {}

    def opening(self) -> str:
        """The first events of a stream."""
        return ""

    @abstractmethod
    def news(self) -> str:
        """Events for what came since the last time."""

    @abstractmethod
    def closing(self, result: R) -> Iterator[str]:
        """The last events of a stream, before [DONE]."""


class Endpoint(ABC):
    """A POST endpoint of a server.

    Args:
      name: of the route in the metrics, and of the operation in the OpenAPI document.
      prefix: of its counters: `<prefix>disconnects_total` and `<prefix>rejected_total` by reason.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        *,
        settings: HttpSettings,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self.__name__, self._prefix = name, prefix
        self._settings, self.admission, self.metrics = settings, admission, metrics

    @abstractmethod
    def exchange(self, request: Request) -> contextlib.AbstractAsyncContextManager[Exchange[Any]]:
        """Reads a request; what it holds is given back at the end. Raises ApiError."""

    def check(self) -> None:  # noqa: B027 (most endpoints can always be asked)
        """Raises ApiError while nothing can be asked for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.check()
            with self.admission.entrance():
                async with self.exchange(Request(scope, receive)) as exchange:
                    await self._answer(exchange, scope, receive, send)
        except ClientDisconnect:
            self.metrics.add(self._prefix + "disconnects_total")
        except ApiError as error:
            if error.status in (429, 503):
                self.metrics.add(
                    self._prefix + "rejected_total", reason=error.code or str(error.status)
                )
            raise

    async def _answer(
        self, exchange: Exchange[Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        work = asyncio.create_task(exchange.work())
        gone = asyncio.create_task(_disconnected(receive))
        self.admission.tasks.add(work)
        for task in (work, gone):
            task.add_done_callback(lambda _: exchange.changed.set())
        try:
            if exchange.stream:
                await self._stream(exchange, work, gone, send)
            else:
                await self._whole(exchange, work, gone, scope, receive, send)
        finally:
            self.admission.tasks.discard(work)
            if not work.done():
                self.metrics.add(self._prefix + "disconnects_total")
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})  # the request holds its place until its run has ended
            if not work.cancelled():
                work.exception()  # else asyncio logs it as never retrieved

    async def _whole(
        self,
        exchange: Exchange[R],
        work: asyncio.Task[R],
        gone: asyncio.Task[None],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return
        body = exchange.whole(_result(work)).model_dump()
        response = JSONResponse(body, headers=exchange.headers())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.send_seconds):
                await response(scope, receive, send)

    async def _stream(
        self, exchange: Exchange[R], work: asyncio.Task[R], gone: asyncio.Task[None], send: Send
    ) -> None:
        while not (exchange.begun() or work.done() or gone.done()):
            exchange.changed.clear()
            await exchange.changed.wait()
        if work.done():
            _result(work)
        if gone.done():
            return
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
            **exchange.headers(),
        }
        raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]

        async def put(text: str, more: bool = True) -> None:
            if text or not more:
                async with asyncio.timeout(self._settings.send_seconds):
                    await send(
                        {"type": "http.response.body", "body": text.encode(), "more_body": more}
                    )

        with contextlib.suppress(TimeoutError):  # the client stopped reading: as good as gone
            await send({"type": "http.response.start", "status": 200, "headers": raw})
            await put(exchange.opening())
            async for text in self._news(exchange, work, gone):
                await put(text)
            if not work.done():
                return
            try:
                result = _result(work)
            except ApiError as error:
                await put(event(error.body()))
            else:
                for text in exchange.closing(result):
                    await put(text)
            await put(DONE)
            await put("", more=False)

    async def _news(
        self, exchange: Exchange[R], work: asyncio.Task[R], gone: asyncio.Task[None]
    ) -> AsyncIterator[str]:
        """News until the work is done or the client is gone; a comment where there is none for a
        while."""
        while not gone.done():
            exchange.changed.clear()
            if text := exchange.news():
                yield text
            elif work.done():
                await asyncio.sleep(0)  # what the run told last is on its way to `news`
                yield exchange.news()
                return
            else:
                try:
                    async with asyncio.timeout(self._settings.keep_alive_seconds):
                        await exchange.changed.wait()
                except TimeoutError:
                    yield KEEP_ALIVE


def event(data: Mapping[str, Any]) -> str:
    """A server-sent event with this JSON object."""
    return "data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n\n"


async def json_body(request: Request) -> bytes:
    """Raises ApiError: 415, or 413 and 408 for a body that is too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        text = "The body must be JSON, sent as Content-Type: application/json."
        raise ApiError(415, text, code="unsupported_media_type", close=True)
    return await request.body()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _result(work: asyncio.Task[R]) -> R:
    """The result of work that is done. Raises its error as an ApiError."""
    if work.cancelled():
        raise from_run(Cancelled())
    error = work.exception()
    if error is not None:
        raise from_run(error)
    return work.result()
