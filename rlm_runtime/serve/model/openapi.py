"""The OpenAPI document of a model server, made from the models it checks requests with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlm_runtime.serve.http import openapi as o
from rlm_runtime.serve.model import schemas as s

INPUTS = (s.CompletionRequest, s.ChatRequest, s.TokenizeRequest, s.DetokenizeRequest)
OUTPUTS = (
    s.Completion,
    s.ChatReply,
    s.ServedModelOut,
    s.ServedModelList,
    s.Tokenized,
    s.Detokenized,
    s.Version,
    s.TokenizerInfo,
)
GOING_WRONG = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


def document(models: Sequence[str]) -> dict[str, Any]:
    """The document of a server with these models (none while they load)."""
    schemas = o.schemas_of(INPUTS, OUTPUTS)
    if models:
        for name in ("CompletionRequest", "ChatRequest"):
            schemas[name]["properties"]["model"]["enum"] = list(models)
        for name in ("TokenizeRequest", "DetokenizeRequest"):
            known = [{"type": "string", "enum": list(models)}, {"type": "null"}]
            schemas[name]["properties"]["model"] = {"anyOf": known}
    about = "Language models of recursive depth behind OpenAI's completions API."
    return o.document("mor_jax", about, schemas, _paths(list(models)))


def _paths(models: list[str]) -> dict[str, Any]:
    name = {"type": "string", **({"enum": models} if models else {})}
    in_path = {"name": "model", "in": "path", "required": True, "schema": name}
    in_query = {"name": "model", "in": "query", "required": False, "schema": name}
    return {
        "/v1/completions": _post(
            "completions",
            "Continue one prompt or many.",
            "CompletionRequest",
            "Completion",
            streams=True,
        ),
        "/v1/chat/completions": _post(
            "chat_completions", "Reply to messages.", "ChatRequest", "ChatReply", streams=True
        ),
        "/v1/models": {
            "get": o.get_of("list_models", "The models of this server.", "ServedModelList", 503)
        },
        "/v1/models/{model}": {
            "get": o.get_of(
                "get_model", "One model.", "ServedModelOut", 404, 503, parameters=[in_path]
            )
        },
        "/tokenize": _post(
            "tokenize", "Token ids of a text, or of messages.", "TokenizeRequest", "Tokenized"
        ),
        "/detokenize": _post(
            "detokenize", "The text of token ids.", "DetokenizeRequest", "Detokenized"
        ),
        "/tokenizer_info": {
            "get": o.get_of(
                "tokenizer_info",
                "About the tokenizer.",
                "TokenizerInfo",
                404,
                503,
                parameters=[in_query],
            )
        },
        "/health": o.probe_of("health", "The models are loaded and their engines live.", 503),
        "/ready": o.probe_of(
            "ready", "Requests are taken; 503 while loading and while stopping.", 503
        ),
        "/version": {"get": o.get_of("version", "The version of the server.", "Version")},
    }


def _post(
    name: str, summary: str, asked: str, answer: str, *, streams: bool = False
) -> dict[str, Any]:
    return o.post_of(name, summary, asked, answer, *GOING_WRONG, streams=streams)
