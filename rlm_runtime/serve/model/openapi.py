"""The OpenAPI document of a model server, made from the models it checks requests with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from rlm_runtime.serve.model import schemas as s
from rlm_runtime.serve.openapi import REF, body_of, errors_of, get_of, metrics_path, ok_of, version
from rlm_runtime.serve.schemas import ErrorBody, Status

INPUTS = (s.CompletionRequest, s.ChatRequest, s.TokenizeRequest, s.DetokenizeRequest)
OUTPUTS = (s.Completion, s.ChatReply, s.ServedModelOut, s.ServedModelList, s.Tokenized, s.Detokenized, s.Version,
           s.TokenizerInfo, ErrorBody, Status)  # fmt: skip
GOING_WRONG = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


def document(models: Sequence[str]) -> dict[str, Any]:
    """The document of a server with these models (none while they load)."""
    wanted = [(m, "validation") for m in INPUTS] + [(m, "serialization") for m in OUTPUTS]
    _, found = models_json_schema(wanted, ref_template=REF, by_alias=True)  # type: ignore[arg-type]
    schemas = found["$defs"]
    if models:
        for name in ("CompletionRequest", "ChatRequest"):
            schemas[name]["properties"]["model"]["enum"] = list(models)
        for name in ("TokenizeRequest", "DetokenizeRequest"):
            known = [{"type": "string", "enum": list(models)}, {"type": "null"}]
            schemas[name]["properties"]["model"] = {"anyOf": known}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mor_jax",
            "version": version(),
            "description": "Language models of recursive depth behind OpenAI's completions API.",
        },
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
        "paths": _paths(list(models)),
    }


def _paths(models: list[str]) -> dict[str, Any]:
    name = {"type": "string", **({"enum": models} if models else {})}
    in_path = {"name": "model", "in": "path", "required": True, "schema": name}
    in_query = {"name": "model", "in": "query", "required": False, "schema": name}
    return {
        "/v1/completions": _post(
            "completions", "Continue one prompt or many.", "CompletionRequest", "Completion", True
        ),
        "/v1/chat/completions": _post("chat_completions", "Reply to messages.", "ChatRequest", "ChatReply", True),
        "/v1/models": {"get": get_of("list_models", "The models of this server.", "ServedModelList", 503)},
        "/v1/models/{model}": {
            "get": get_of("get_model", "One model.", "ServedModelOut", 404, 503, parameters=[in_path])
        },
        "/tokenize": _post("tokenize", "Token ids of a text, or of messages.", "TokenizeRequest", "Tokenized"),
        "/detokenize": _post("detokenize", "The text of token ids.", "DetokenizeRequest", "Detokenized"),
        "/tokenizer_info": {
            "get": get_of("tokenizer_info", "About the tokenizer.", "TokenizerInfo", 404, 503, parameters=[in_query])
        },
        "/health": _open("health", "The models are loaded and their engines live."),
        "/ready": _open("ready", "Requests are taken; 503 while loading and while stopping."),
        "/version": {"get": get_of("version", "The version of the server.", "Version")},
        "/metrics": metrics_path(),
    }


def _open(name: str, summary: str) -> dict[str, Any]:
    return {"get": {**get_of(name, summary, "Status", 503), "security": []}}


def _post(name: str, summary: str, asked: str, answer: str, streams: bool = False) -> dict[str, Any]:
    good = ok_of(answer)
    if streams:
        good = {**good, "content": {**good["content"], "text/event-stream": {}}}
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "requestBody": body_of("application/json", {"$ref": REF.format(model=asked)}),
            "responses": {"200": good, **errors_of(*GOING_WRONG)},
        }
    }
