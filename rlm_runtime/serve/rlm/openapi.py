"""The OpenAPI document of an RLM server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlm_runtime.serve.http import openapi as o
from rlm_runtime.serve.http.schemas import FileDeleted, FileList, FileOut, ModelOut
from rlm_runtime.serve.rlm.schemas import ChatCompletion, ChatRequest, ModelList

OUTPUTS = (ChatCompletion, ModelOut, ModelList, FileOut, FileList, FileDeleted)
GOING_WRONG = (400, 401, 403, 404, 408, 413, 415, 429, 500, 502, 503, 504)
RUN = {"X-RLM-Run": {"schema": {"type": "string"}, "description": "Id of the trajectory."}}


def document(models: Sequence[str]) -> dict[str, Any]:
    """The document of a server with these models."""
    schemas = o.schemas_of((ChatRequest,), OUTPUTS)
    schemas["ChatRequest"]["properties"]["model"]["enum"] = list(models)
    about = "Recursive language models behind OpenAI's chat completions API."
    return o.document("rlm_runtime", about, schemas, _paths(list(models)))


def _paths(models: list[str]) -> dict[str, Any]:
    file_id = {
        "name": "file_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": "^file-[0-9a-f]{32}$"},
    }
    model_id = {
        "name": "model",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": models},
    }
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
        "/v1/chat/completions": o.post_of(
            "chat_completions",
            "Run a recursive language model on the messages and files of a conversation.",
            "ChatRequest",
            "ChatCompletion",
            *GOING_WRONG,
            streams=True,
            headers=RUN,
        ),
        "/v1/models": {"get": o.get_of("list_models", "The models of this server.", "ModelList")},
        "/v1/models/{model}": {
            "get": o.get_of("get_model", "One model.", "ModelOut", 404, parameters=[model_id])
        },
        "/v1/files": {
            "get": o.get_of("list_files", "The files uploaded with this key.", "FileList"),
            "post": {
                "operationId": "upload_file",
                "summary": "Upload long material, to be named in a message or in rlm.context_file_ids.",
                "requestBody": o.body_of("multipart/form-data", upload),
                "responses": {
                    "200": o.ok_of("FileOut"),
                    **o.errors_of(400, 401, 403, 408, 413, 415, 503),
                },
            },
        },
        "/v1/files/{file_id}": {
            "get": o.get_of(
                "get_file", "One file's description.", "FileOut", 404, parameters=[file_id]
            ),
            "delete": o.get_of(
                "delete_file", "Remove a file.", "FileDeleted", 404, parameters=[file_id]
            ),
        },
        "/v1/files/{file_id}/content": {
            "get": {
                "operationId": "get_file_content",
                "summary": "The bytes of a file.",
                "parameters": [file_id],
                "responses": {
                    "200": {
                        "description": "The bytes.",
                        "content": {"application/octet-stream": {}},
                    },
                    **o.errors_of(401, 403, 404),
                },
            }
        },
        "/health": o.probe_of("health", "The process is alive."),
        "/ready": o.probe_of("ready", "Requests are taken; 503 while stopping.", 503),
    }
