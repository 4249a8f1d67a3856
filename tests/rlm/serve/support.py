"""A server on a loopback port in a thread of this process, and runs that end when a test says
so."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loopback import Loopback, loopback

from rlm_runtime.lms.base import Message, Usage
from rlm_runtime.rlm.results import RLMResult
from rlm_runtime.serve import ServedModel, ServeSettings, create_app
from rlm_runtime.trajectory import CellStart, NodeEnd, NodeStart, Replied, RunStart

USAGE = Usage(calls=3, input_tokens=100, output_tokens=40, cached_tokens=60, cost_usd=0.25)


@dataclass(frozen=True)
class Scripted(ServedModel):
    """`act(context, question, gate)` decides what a run comes to: a result, an answer, or an
    exception to raise."""

    root: Any = None
    act: Callable[..., Any] = lambda context, question, gate: "the answer"
    gate: Gate = field(default_factory=lambda: Gate())

    def build(self, request: Any, *, log_dir: Any, on_event: Any, budget: Any, depth: int) -> Any:
        return _Run(self, on_event, request, budget, depth)


class Gate:
    """Counts runs; with `closed` they wait in the middle until they are cancelled or it is
    opened."""

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
        self.model, self.on_event, self.request, self.budget, self.depth = (
            model,
            on_event,
            request,
            budget,
            depth,
        )

    async def acompletion(self, context: Any, question: Any, output: Any = None) -> Any:
        gate = self.model.gate
        gate.seen.append(
            {
                "context": context,
                "question": question,
                "output": output,
                "budget": self.budget,
                "depth": self.depth,
                "request": self.request,
                "text": read(context),
            }
        )
        gate.note(started=1)
        self.on_event(RunStart(run="run-1", started_at="2026-01-01T00:00:00Z"))
        self.on_event(
            Replied(turn=1, message=Message(role="assistant", content="code"), usage=USAGE)
        )
        self.on_event(
            CellStart(turn=1, cell=1, code="print(context[:10])\x1b[31m\n: not a comment")
        )
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
    return RLMResult(
        answer=answer,
        usage=USAGE,
        usage_by_depth={0: USAGE},
        turns=2,
        sub_calls=2,
        run="run-1",
        **fields,
    )


def read(context: Any) -> Any:
    """What the run would find in its context, read while it is there."""
    if context.kind == "file":
        return context.path.read_text()
    if context.kind == "folder" and context.files:
        return {name: p.read_text() for name, p in context.files}
    if context.kind == "folder":
        return {p.name: p.read_text() for p in sorted(context.path.iterdir())}
    return context.value


class Server(Loopback):
    """Its model is named "rlm"."""

    @property
    def files(self) -> Any:
        return self.app.state.files

    def chat(
        self, text: str = "hello", headers: dict[str, str] | None = None, **fields: Any
    ) -> tuple[int, dict, dict]:
        body = {"model": "rlm", "messages": [{"role": "user", "content": text}], **fields}
        status, out, raw = self.request("POST", "/v1/chat/completions", body, headers)
        return status, out, json.loads(raw)

    def open_chat(self, **fields: Any) -> http.client.HTTPConnection:
        """A request whose answer is not waited for."""
        body = {"model": "rlm", "messages": [{"role": "user", "content": "hello"}], **fields}
        return self.begin("POST", "/v1/chat/completions", body, timeout=30)

    def wait_metric(self, name: str, value: float, seconds: float = 20.0, **labels: str) -> None:
        """Wait until a metric has this value: what it counts happens after a client has seen its
        answer."""
        self.wait_for(
            lambda: self.metrics.value(name, **labels) == value, f"{name} to be {value}", seconds
        )


@contextmanager
def running(*models: ServedModel, **settings: Any) -> Iterator[Server]:
    """A server of these models."""
    app = create_app(
        models or (Scripted("rlm"),), ServeSettings(**{"drain_seconds": 0.1, **settings})
    )
    with loopback(app, Server) as server:
        try:
            yield server
        finally:
            for model in models:
                if isinstance(model, Scripted):
                    model.gate.opened.set()
