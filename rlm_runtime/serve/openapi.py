"""The OpenAPI document, made from the models the server checks requests with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from pydantic.json_schema import models_json_schema

from rlm_runtime.serve import schemas as s

REF = "#/components/schemas/{model}"
CREATED = {"X-Request-Id": {"schema": {"type": "string"}}}


def document(models: Sequence[str]) -> dict[str, Any]:
    """The document of a server with these models."""
    inputs, outputs = (s.ChatRequest,), (
        s.ChatCompletion, s.ModelOut, s.ModelList, s.FileOut, s.FileList, s.FileDeleted, s.ErrorBody, s.Status,
    )  # fmt: skip
    wanted = [(m, "validation") for m in inputs] + [(m, "serialization") for m in outputs]
    _, found = models_json_schema(wanted, ref_template=REF, by_alias=True)  # type: ignore[arg-type]
    found["$defs"]["ChatRequest"]["properties"]["model"]["enum"] = list(models)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rlm_runtime",
            "version": version(),
            "description": "Recursive language models behind OpenAI's chat completions API.",
        },
        "components": {
            "schemas": found["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": _paths(list(models)),
    }


def _paths(models: list[str]) -> dict[str, Any]:
    file_id = {"name": "file_id", "in": "path", "required": True,
               "schema": {"type": "string", "pattern": "^file-[0-9a-f]{32}$"}}  # fmt: skip
    model_id = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": models}}
    upload = {
        "type": "object",
        "required": ["file"],
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "maxLength": 64},
            "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
            "expires_after[seconds]": {"type": "integer", "minimum": 1, "maximum": 2**31},
        },
    }
    return {
        "/v1/chat/completions": {
            "post": {
                "operationId": "chat_completions",
                "summary": "Run a recursive language model on the messages and files of a conversation.",
                "requestBody": body_of("application/json", {"$ref": REF.format(model="ChatRequest")}),
                "responses": {
                    "200": {
                        "description": "The answer; with stream: true, server-sent events.",
                        "headers": {
                            "X-RLM-Run": {"schema": {"type": "string"}, "description": "Id of the trajectory."}
                        },
                        "content": {
                            "application/json": {"schema": {"$ref": REF.format(model="ChatCompletion")}},
                            "text/event-stream": {},
                        },
                    },
                    **errors_of(400, 401, 403, 404, 408, 413, 415, 429, 500, 502, 503, 504),
                },
            }
        },
        "/v1/models": {"get": get_of("list_models", "The models of this server.", "ModelList")},
        "/v1/models/{model}": {"get": get_of("get_model", "One model.", "ModelOut", 404, parameters=[model_id])},
        "/v1/files": {
            "get": get_of("list_files", "The files uploaded with this key.", "FileList"),
            "post": {
                "operationId": "upload_file",
                "summary": "Upload long material, to be named in a message or in rlm.context_file_ids.",
                "requestBody": body_of("multipart/form-data", upload),
                "responses": {"200": ok_of("FileOut"), **errors_of(400, 401, 403, 408, 413, 415, 503)},
            },
        },
        "/v1/files/{file_id}": {
            "get": get_of("get_file", "One file's description.", "FileOut", 404, parameters=[file_id]),
            "delete": get_of("delete_file", "Remove a file.", "FileDeleted", 404, parameters=[file_id]),
        },
        "/v1/files/{file_id}/content": {
            "get": {
                "operationId": "get_file_content",
                "summary": "The bytes of a file.",
                "parameters": [file_id],
                "responses": {
                    "200": {"description": "The bytes.", "content": {"application/octet-stream": {}}},
                    **errors_of(401, 403, 404),
                },
            }
        },
        "/health": {"get": {**get_of("health", "The process is alive.", "Status"), "security": []}},
        "/ready": {
            "get": {**get_of("ready", "Requests are taken; 503 while stopping.", "Status", 503), "security": []}
        },
        "/metrics": metrics_path(),
    }


def get_of(name: str, summary: str, model: str, *statuses: int, parameters: list[Any] | None = None) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        **({"parameters": parameters} if parameters else {}),
        "responses": {"200": ok_of(model), **errors_of(401, 403, *statuses)},
    }


def metrics_path() -> dict[str, Any]:
    text = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    responses = {"200": text, **errors_of(401, 403)}
    return {"get": {"operationId": "metrics", "summary": "Prometheus metrics.", "responses": responses}}


def ok_of(model: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REF.format(model=model)}}}
    return {"description": "Done.", "headers": CREATED, "content": content}


def errors_of(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REF.format(model="ErrorBody")}}}
    return {str(status): {"description": "An error.", "content": content} for status in statuses}


def body_of(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {kind: {"schema": schema}}}


def version() -> str:
    try:
        return metadata.version("mor-jax")
    except metadata.PackageNotFoundError:
        return "0"
