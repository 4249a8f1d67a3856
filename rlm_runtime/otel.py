"""Runs as OpenTelemetry traces (`pip install ".[otel]"`).

    RLM(..., on_event=OTelExporter())

One trace a run: a span for the run, for each model call (with the `gen_ai` attributes of the
semantic conventions), each cell, each child RLM and each tool. Spans hold no text of the context,
of prompts or of replies unless `content=True`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import Usage
from rlm_runtime.trajectory import (
    AnyEvent,
    BudgetNote,
    CellEnd,
    CellStart,
    Compacted,
    NodeEnd,
    NodeStart,
    Nudged,
    Replied,
    RunEnd,
    RunStart,
)

SHOWN = 10_000  # characters of one text, with `content`


class OTelExporter:
    """For `RLM(on_event=...)`: makes spans of the events of every run.

    Args:
      tracer_provider: default: the global one, which your application has set up (exporter,
        sampling, resource).
      content: also record code, outputs, prompts and replies, cut at 10,000 characters.
    Raises:
      UsageError: the package opentelemetry-api is missing.
    """

    def __init__(self, tracer_provider: Any = None, *, content: bool = False):
        try:
            from opentelemetry import trace
        except ImportError:
            raise UsageError(
                'traces need the package opentelemetry-api: pip install ".[otel]".'
            ) from None
        self._tracer = trace.get_tracer("rlm_runtime", tracer_provider=tracer_provider)
        self._content = content

    def for_run(self, run: str) -> _Trace:
        """The listener of one run. Its spans are children of the span that is current where the run
        begins."""
        return _Trace(self._tracer, run, self._content)


class _Trace:
    def __init__(self, tracer: Any, run: str, content: bool):
        from opentelemetry import context

        self._tracer, self._run, self._content = tracer, run, content
        self._around = context.get_current()
        self._lock = threading.Lock()  # events may come from several threads
        self._began = 0  # nanoseconds since the epoch
        self._open: dict[str, Any] = {}  # spans by node, and by node and cell
        self._models: dict[str, str] = {}

    def __call__(self, event: AnyEvent) -> None:
        with self._lock:
            self._note(event)

    def _note(self, event: AnyEvent) -> None:
        match event:
            case RunStart():
                self._began = time.time_ns() - int(event.t * 1e9)
                self._models["0"] = event.root
                about: dict[str, Any] = {
                    "run.id": self._run,
                    "root": event.root,
                    "sub": event.sub,
                    "max_depth": event.max_depth,
                }
                self._begin("0", "rlm.run", event, about, {"question": event.question})
            case NodeStart():
                self._models[event.node] = event.model
                name = {
                    "lm": f"chat {event.model}",
                    "rlm": "rlm.child",
                    "tool": f"execute_tool {event.model}",
                }
                about = {"node": event.node, "depth": event.depth}
                about |= _named(event.kind, event.model)
                text = {"prompt": event.prompt, "question": event.question}
                self._begin(event.node, name[event.kind], event, about, text, parent=event.parent)
            case NodeEnd():
                self._end(
                    event.node,
                    event,
                    _used(event.usage),
                    {"value": event.value},
                    event.error,
                    event.kind,
                )
            case Replied():
                model = self._models.get(event.node, "")
                about = {"turn": event.turn, **_named("lm", model)}
                key = f"{event.node} reply"
                self._begin(
                    key, f"chat {model}", event, about, {}, parent=event.node, before=event.seconds
                )
                end = {
                    **_used(event.usage),
                    "gen_ai.response.finish_reasons": (event.finish_reason,),
                }
                self._end(key, event, end, {"reply": event.message.content})
            case CellStart():
                about = {"turn": event.turn, "cell": event.cell}
                self._begin(
                    f"{event.node} cell",
                    "rlm.cell",
                    event,
                    about,
                    {"code": event.code},
                    parent=event.node,
                )
            case CellEnd():
                status, output = event.result.status, event.result.stdout
                failed = None if status == "ok" else status
                self._end(
                    f"{event.node} cell",
                    event,
                    {"status": status},
                    {"output": output},
                    failed,
                    failed,
                )
            case Nudged():
                self._mark(event, "nudged", {"reason": event.reason})
            case Compacted():
                self._mark(
                    event, "compacted", {"before": event.tokens_before, "after": event.tokens_after}
                )
            case BudgetNote() if event.refused:
                self._mark(event, "limit reached", {"limit": event.refused})
            case RunEnd():
                for key in [k for k in self._open if k != "0"]:
                    self._end(key, event, {}, {}, "the run ended first", "cancelled")
                about = {
                    "stop_reason": event.stop_reason,
                    "turns": event.turns,
                    **_used(event.usage),
                }
                error = event.error if event.stop_reason == "error" else None
                self._end("0", event, about, {"answer": event.answer}, error, event.stop_reason)

    def _begin(
        self,
        key: str,
        name: str,
        event: AnyEvent,
        about: Mapping[str, Any],
        text: Mapping[str, Any],
        *,
        parent: str | None = None,
        before: float = 0.0,
    ) -> None:
        from opentelemetry import trace

        above = self._open.get(parent or "")
        context = (
            trace.set_span_in_context(above, self._around) if above is not None else self._around
        )
        span = self._tracer.start_span(
            name,
            context=context,
            kind=trace.SpanKind.CLIENT if name.startswith("chat ") else trace.SpanKind.INTERNAL,
            start_time=self._began + int((event.t - before) * 1e9),
        )
        self._open[key] = span
        self._set(span, about, text)

    def _end(
        self,
        key: str,
        event: AnyEvent,
        about: Mapping[str, Any],
        text: Mapping[str, Any],
        error: str | None = None,
        kind: str | None = None,
    ) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = self._open.pop(key, None)
        if span is None:
            return
        self._set(span, about, text)
        if error is not None:
            span.set_attribute("error.type", kind or "error")
            span.set_status(Status(StatusCode.ERROR, error[:SHOWN] if self._content else kind))
        span.end(end_time=self._began + int(event.t * 1e9))

    def _mark(self, event: AnyEvent, name: str, about: Mapping[str, Any]) -> None:
        span = self._open.get(event.node)
        if span is not None:
            names = {f"rlm.{n}": v for n, v in about.items()}
            span.add_event(name, names, timestamp=self._began + int(event.t * 1e9))

    def _set(self, span: Any, about: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        shown = (
            {n: str(v)[:SHOWN] for n, v in text.items() if v is not None} if self._content else {}
        )
        for name, value in {**about, **shown}.items():
            if value is not None:
                span.set_attribute(name if name.startswith("gen_ai.") else f"rlm.{name}", value)


def _named(kind: str, name: str) -> dict[str, Any]:
    if kind == "tool":
        return {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name}
    if kind != "lm":
        return {}
    provider, _, model = name.partition(":")
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model or provider,
    }


def _used(usage: Usage) -> dict[str, Any]:
    if not usage.calls:
        return {}
    return {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "calls": usage.calls,
        "cost_usd": usage.cost_usd,
    }
