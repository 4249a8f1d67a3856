"""A run in OpenAI's two shapes: completions and chat, each whole or as the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Literal, Protocol

from rlm_runtime.serve.model.backend import ModelBackend, Tokenizer
from rlm_runtime.serve.model.plan import RequestPlan, plan_chat, plan_completion
from rlm_runtime.serve.model.run import RequestRun
from rlm_runtime.serve.model.schemas import (
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatMessageOut,
    ChatReply,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Drawn,
    TopLogprob,
)
from rlm_runtime.serve.model.sequence import Scored, Sequence
from rlm_runtime.serve.model.settings import ModelSettings

LOWEST = -9999.0  # JSON has no minus infinity


class Shape(Protocol):
    """What differs between the two endpoints."""

    name: str  # of the endpoint
    request: type[Drawn]
    prefix: str  # of ids
    chunk_object: str

    def plan(self, asked: Any, model: ModelBackend, settings: ModelSettings) -> RequestPlan: ...

    def whole(self, run: RequestRun, identity: str) -> Completion | ChatReply: ...

    def opening(self, index: int) -> dict[str, Any] | None: ...

    def piece(
        self, run: RequestRun, index: int, text: str, scores: list[Scored]
    ) -> dict[str, Any]: ...

    def closing(self, run: RequestRun, index: int, sequence: Sequence) -> dict[str, Any]: ...


def finish_reason(sequence: Sequence) -> Literal["stop", "length"]:
    """OpenAI's clients know only these two; `mor.ended` says it exactly."""
    return "stop" if sequence.ended == "stop" else "length"


class CompletionShape(Shape):
    name, request, prefix, chunk_object = (
        "completions",
        CompletionRequest,
        "cmpl-",
        "text_completion",
    )

    def plan(
        self, asked: CompletionRequest, model: ModelBackend, settings: ModelSettings
    ) -> RequestPlan:
        return plan_completion(asked, model, settings)

    def whole(self, run: RequestRun, identity: str) -> Completion:
        choices = []
        for index, sequence in run.shown():
            text, scores = sequence.pull()
            choices.append(
                CompletionChoice(
                    index=index,
                    text=text,
                    logprobs=self._logprobs(run.plan, scores),
                    finish_reason=finish_reason(sequence),
                    mor=run.notes(sequence),
                )
            )
        return Completion(
            id=identity,
            created=int(time.time()),
            model=run.plan.model.name,
            choices=choices,
            usage=run.usage(),
        )

    def opening(self, index: int) -> None:
        return None

    def piece(self, run: RequestRun, index: int, text: str, scores: list[Scored]) -> dict[str, Any]:
        logprobs = self._logprobs(run.plan, scores)
        return {
            "index": index,
            "text": text,
            "finish_reason": None,
            "logprobs": logprobs.model_dump() if logprobs else None,
        }

    def closing(self, run: RequestRun, index: int, sequence: Sequence) -> dict[str, Any]:
        return {
            "index": index,
            "text": "",
            "logprobs": None,
            "finish_reason": finish_reason(sequence),
            "mor": run.notes(sequence).model_dump(),
        }

    def _logprobs(self, plan: RequestPlan, scores: list[Scored]) -> CompletionLogprobs | None:
        if plan.logprobs is None:
            return None
        tokenizer = plan.model.tokenizer
        tops: list[dict[str, float] | None] = []
        for s in scores:
            if s.logprob is None:
                tops.append(None)
                continue
            top = {shown(tokenizer, t): bounded(v) for t, v in s.top[: plan.logprobs]}
            tops.append({**top, shown(tokenizer, s.id): bounded(s.logprob)})
        return CompletionLogprobs(
            tokens=[shown(tokenizer, s.id) for s in scores],
            token_logprobs=[None if s.logprob is None else bounded(s.logprob) for s in scores],
            top_logprobs=tops if plan.logprobs else None,
            text_offset=[s.start for s in scores],
        )


class ChatShape(Shape):
    name, request, prefix, chunk_object = (
        "chat_completions",
        ChatRequest,
        "chatcmpl-",
        "chat.completion.chunk",
    )

    def plan(self, asked: ChatRequest, model: ModelBackend, settings: ModelSettings) -> RequestPlan:
        return plan_chat(asked, model, settings)

    def whole(self, run: RequestRun, identity: str) -> ChatReply:
        choices = []
        for index, sequence in run.shown():
            text, scores = sequence.pull()
            choices.append(
                ChatChoice(
                    index=index,
                    message=ChatMessageOut(content=text),
                    logprobs=self._logprobs(run.plan, scores),
                    finish_reason=finish_reason(sequence),
                    mor=run.notes(sequence),
                )
            )
        return ChatReply(
            id=identity,
            created=int(time.time()),
            model=run.plan.model.name,
            choices=choices,
            usage=run.usage(),
        )

    def opening(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def piece(self, run: RequestRun, index: int, text: str, scores: list[Scored]) -> dict[str, Any]:
        logprobs = self._logprobs(run.plan, scores)
        return {
            "index": index,
            "delta": {"content": text},
            "finish_reason": None,
            "logprobs": logprobs.model_dump() if logprobs else None,
        }

    def closing(self, run: RequestRun, index: int, sequence: Sequence) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finish_reason(sequence),
            "mor": run.notes(sequence).model_dump(),
        }

    def _logprobs(self, plan: RequestPlan, scores: list[Scored]) -> ChatLogprobs | None:
        if plan.logprobs is None:
            return None
        tokenizer = plan.model.tokenizer
        content = [
            ChatLogprob(
                **_top(tokenizer, s.id, s.logprob or 0.0).model_dump(),
                top_logprobs=[_top(tokenizer, t, v) for t, v in s.top[: plan.logprobs]],
            )
            for s in scores
        ]
        return ChatLogprobs(content=content)


# ---- tokens as text


def shown(tokenizer: Tokenizer, token: int) -> str:
    """One token as text; bytes that are no text of their own as `bytes:\\xe2\\x82`, so that tokens
    stay apart."""
    piece = tokenizer.piece(token)
    if not piece:
        return tokenizer.token_text(token)
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in piece)


def shown_all(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    return [shown(tokenizer, t) for t in tokens]


def bounded(logprob: float) -> float:
    return max(LOWEST, float(logprob))


def _top(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    piece = tokenizer.piece(token)
    return TopLogprob(
        token=shown(tokenizer, token), logprob=bounded(logprob), bytes=list(piece) or None
    )
