"""Fields of a chat request beside its messages: unsupported ones are refused by name, the others are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlm_runtime.serve.errors import ApiError, refuse
from rlm_runtime.serve.schemas import ChatRequest, SchemaFormat

UNHEARD = ("n", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "logit_bias", "tools",
           "tool_choice", "functions", "function_call", "modalities", "audio")  # fmt: skip


def check(request: ChatRequest) -> None:
    """Raises ApiError for fields that would have no effect."""
    if request.n not in (None, 1):
        raise refuse("n must be 1: a run gives one answer.", "n", "unsupported_value")
    if request.tools or request.functions:
        name = "tools" if request.tools else "functions"
        text = f"{name} cannot be given in a request; the tools of an RLM are set where the server is started."
        raise refuse(text, name, "unsupported_parameter")
    if request.tool_choice not in (None, "none", "auto"):
        raise refuse("tool_choice must be none or auto: there are no tools.", "tool_choice", "unsupported_value")
    if request.function_call not in (None, "none", "auto"):
        raise refuse(
            "function_call must be none or auto: there are no functions.", "function_call", "unsupported_value"
        )
    if request.logprobs or request.top_logprobs:
        raise refuse(
            "logprobs are not available: the answer comes out of a program.", "logprobs", "unsupported_parameter"
        )
    if request.audio is not None or any(m != "text" for m in request.modalities or ()):
        raise refuse("Only text comes out of this model.", "modalities", "unsupported_value")
    if request.stream_options is not None and not request.stream:
        raise refuse("stream_options needs stream: true.", "stream_options")
    if request.metadata is not None and (
        len(request.metadata) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in request.metadata.items())
    ):
        raise refuse("metadata takes 16 pairs, keys to 64 and values to 512 characters.", "metadata")


def no_such_model(name: str, models: Mapping[str, Any]) -> ApiError:
    there = ", ".join(sorted(models)[:20])
    return ApiError(404, f"The model {name[:100]!r} does not exist here. There are: {there}.", param="model",
                    code="model_not_found")  # fmt: skip


def ignored(request: ChatRequest) -> list[str]:
    """Fields that were given and had no effect."""
    silent = [name for name in UNHEARD if getattr(request, name) not in (None, [], {}) and name != "n"]
    unknown = [name for name in (request.model_extra or {}) if (request.model_extra or {})[name] is not None]
    return sorted(name[:64] for name in [*silent, *unknown])[:50]


def schema_of(request: ChatRequest) -> dict[str, Any] | None:
    form = request.response_format
    if isinstance(form, SchemaFormat):
        return form.json_schema.schema_ or {"type": "object"}
    return {"type": "object"} if form is not None and form.type == "json_object" else None
