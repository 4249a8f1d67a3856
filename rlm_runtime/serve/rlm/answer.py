"""A run's result in OpenAI's shape, with our report beside it."""

from __future__ import annotations

import json
from typing import Literal

from rlm_runtime.budget import Budget
from rlm_runtime.lms.base import Usage
from rlm_runtime.rlm.results import RLMResult
from rlm_runtime.serve.rlm.schemas import (
    ChatRequest,
    CompletionDetails,
    DepthUsage,
    PromptDetails,
    RunReport,
    UsageOut,
)

Finish = Literal["stop", "length"]
CHARS_A_TOKEN = 4  # for `max_tokens`, which bounds the text of the answer


def answer_text(request: ChatRequest, result: RLMResult) -> tuple[str, Finish]:
    """The answer as text, and why it ends there."""
    answer, structured = result.answer, request.answer_schema() is not None
    if hasattr(answer, "model_dump"):
        answer = answer.model_dump(mode="json")
    plain = isinstance(answer, str) and (not structured or result.partial)
    text = answer if plain else "" if answer is None else json.dumps(answer, ensure_ascii=False)
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be sent
    finish: Finish = "length" if result.partial else "stop"
    if structured:
        return text, finish
    places = [text.find(s) for s in request.stops if s in text]
    if places:
        text, finish = text[: min(places)], "stop"
    if request.max_tokens is not None and len(text) > request.max_tokens * CHARS_A_TOKEN:
        text, finish = text[: request.max_tokens * CHARS_A_TOKEN], "length"
    return text, finish


def usage_out(result: RLMResult, text: str) -> UsageOut:
    usage = result.usage
    hidden = max(0, usage.output_tokens - (len(text) // CHARS_A_TOKEN + 1))
    return UsageOut(
        prompt_tokens=usage.input_tokens,
        completion_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=usage.cached_tokens),
        completion_tokens_details=CompletionDetails(reasoning_tokens=hidden),
    )


def report(
    request: ChatRequest, budget: Budget, depth: int, result: RLMResult, run: str
) -> RunReport:
    limits = {k: v for k, v in budget.model_dump().items() if v is not None}
    return RunReport(
        run=run,
        stop_reason=result.stop_reason,
        partial=result.partial,
        turns=result.turns,
        sub_calls=result.sub_calls,
        calls=result.usage.calls,
        cost_usd=result.cost_usd,
        seconds=round(result.seconds, 3),
        usage_by_depth={str(d): depth_usage(u) for d, u in result.usage_by_depth.items()},
        budget={**limits, "max_depth": depth},
        ignored=request.ignored(),
    )


def depth_usage(usage: Usage) -> DepthUsage:
    return DepthUsage(
        calls=usage.calls,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        cost_usd=usage.cost_usd,
    )
