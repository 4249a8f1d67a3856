"""A server on a loopback port in a thread of this process, and runs that end when a test says so."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from rlm_runtime.lms.base import Message, Usage
from rlm_runtime.rlm.results import RLMResult
from rlm_runtime.serve import ServedModel, ServeSettings, create_app
from rlm_runtime.serve.server import bind, serve
from rlm_runtime.trajectory import CellStart, NodeEnd, NodeStart, Replied, RunStart

USAGE = Usage(calls=3, input_tokens=100, output_tokens=40, cached_tokens=60, cost_usd=0.25)


@dataclass(frozen=True)
class Scripted(ServedModel):
    """`act(context, question, gate)` decides what a run comes to: a result, an answer, or an exception to raise."""

    root: Any = None
    act: Callable[..., Any] = lambda context, question, gate: "the answer"
    gate: Gate = field(default_factory=lambda: Gate())

    def build(self, request: Any, *, log_dir: Any, on_event: Any, budget: Any, depth: int) -> Any:
        return _Run(self, on_event, request, budget, depth)


class Gate:
    """Counts runs; with `closed` they wait in the middle until they are cancelled or it is opened."""

    def __init__(self) -> None:
        self.closed = False
        self.started = self.finished = self.cancelled = 0
        self.seen: list[Any] = []
        self.changed = threading.Condition()
        self.opened = threading.Event()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, seconds), "the server did not get there"

    def note(self, **counts: int) -> None:
        with self.changed:
            for name, value in counts.items():
                setattr(self, name, getattr(self, name) + value)
            self.changed.notify_all()


class _Run:
    def __init__(self, model: Scripted, on_event: Any, request: Any, budget: Any, depth: int):
        self.model, self.on_event, self.request, self.budget, self.depth = model, on_event, request, budget, depth

    async def acompletion(self, context: Any, question: Any, output: Any = None) -> Any:
        gate = self.model.gate
        gate.seen.append({"context": context, "question": question, "output": output, "budget": self.budget,
                          "depth": self.depth, "request": self.request, "text": read(context)})  # fmt: skip
        gate.note(started=1)
        self.on_event(RunStart(run="run-1", started_at="2026-01-01T00:00:00Z"))
        self.on_event(Replied(turn=1, message=Message(role="assistant", content="code"), usage=USAGE))
        self.on_event(CellStart(turn=1, cell=1, code="print(context[:10])\x1b[31m\n: not a comment"))
        self.on_event(NodeStart(node="0.1", parent="0", kind="lm"))
        self.on_event(NodeEnd(node="0.1"))
        try:
            while gate.closed and not gate.opened.is_set():
                await asyncio.sleep(0.01)
            found = self.model.act(context, question, gate)
        except asyncio.CancelledError:
            gate.note(cancelled=1)
            raise
        finally:
            gate.note(finished=1)
        if isinstance(found, BaseException):
            raise found
        return found if isinstance(found, RLMResult) else result(found)


def result(answer: Any, **fields: Any) -> RLMResult:
    return RLMResult(answer=answer, usage=USAGE, usage_by_depth={0: USAGE}, turns=2, sub_calls=2, run="run-1", **fields)


def read(context: Any) -> Any:
    """What the run would find in its context, read while it is there."""
    if context.kind == "file":
        return context.path.read_text()
    if context.kind == "folder" and context.files:
        return {name: p.read_text() for name, p in context.files}
    if context.kind == "folder":
        return {p.name: p.read_text() for p in sorted(context.path.iterdir())}
    return context.value


class Server:
    def __init__(self, port: int, app: Any, stop: Callable[[], None], done: threading.Event):
        self.port, self.app, self.stop, self.done = port, app, stop, done
        self.url = f"http://127.0.0.1:{port}/v1"
        self.metrics, self.admission, self.files = app.state.metrics, app.state.admission, app.state.files

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 30
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        if isinstance(body, dict | list):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def chat(self, text: str = "hello", headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, dict, dict]:
        body = {"model": "rlm", "messages": [{"role": "user", "content": text}], **fields}
        status, out, raw = self.request("POST", "/v1/chat/completions", body, headers)
        return status, out, json.loads(raw)

    def open_chat(self, **fields: Any) -> http.client.HTTPConnection:
        """A request whose answer is not waited for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = {"model": "rlm", "messages": [{"role": "user", "content": "hello"}], **fields}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def wait_metric(self, name: str, value: float, seconds: float = 20.0, **labels: str) -> None:
        """Wait until a metric has this value: what it counts happens after a client has seen its answer."""
        tick = threading.Event()
        for _ in range(int(seconds / 0.02)):
            if self.metrics.value(name, **labels) == value:
                return
            tick.wait(0.02)
        raise AssertionError(f"{name} is {self.metrics.value(name, **labels)}, not {value}")


@contextmanager
def running(*models: ServedModel, **settings: Any) -> Iterator[Server]:
    """`serve` itself, with the signal replaced by a call."""
    listener = bind("127.0.0.1", 0)
    app = create_app(models or (Scripted("rlm"),), ServeSettings(**{"drain_seconds": 0.1, **settings}))
    ready, done, stops = threading.Event(), threading.Event(), []

    def thread() -> None:
        try:
            asyncio.run(serve(app, listener, on_ready=ready.set, stops=stops))
        finally:
            done.set()
            ready.set()

    worker = threading.Thread(target=thread, daemon=True)
    worker.start()
    assert ready.wait(30) and not done.is_set(), "the server did not start"
    server = Server(listener.getsockname()[1], app, lambda: stops[0]("a test"), done)
    try:
        yield server
    finally:
        for model in models:
            if isinstance(model, Scripted):
                model.gate.opened.set()
        with suppress(RuntimeError):  # it may have stopped already
            server.stop()
        worker.join(30)
        assert not worker.is_alive(), "the server did not stop"
