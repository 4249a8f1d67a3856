"""The parts of an OpenAPI document that every server here has; it is made from the models requests
are checked with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rlm_runtime.serve.http.errors import ErrorBody
from rlm_runtime.serve.http.schemas import Status

REF = "#/components/schemas/{model}"
CREATED = {"X-Request-Id": {"schema": {"type": "string"}}}


def schemas_of(
    inputs: Sequence[type[BaseModel]], outputs: Sequence[type[BaseModel]]
) -> dict[str, Any]:
    """The schemas of what a server reads and sends, by name."""
    wanted: list[Any] = [(m, "validation") for m in inputs]
    wanted += [(m, "serialization") for m in (*outputs, ErrorBody, Status)]
    _, found = models_json_schema(wanted, ref_template=REF, by_alias=True)
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def document(
    title: str, description: str, schemas: Mapping[str, Any], paths: Mapping[str, Any]
) -> dict[str, Any]:
    """The document. /metrics is added to `paths`."""
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version(), "description": description},
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": {**paths, "/metrics": metrics_path()},
    }


def probe_of(name: str, summary: str, *statuses: int) -> dict[str, Any]:
    """A route that needs no key."""
    return {"get": {**get_of(name, summary, "Status", *statuses), "security": []}}


def post_of(
    name: str,
    summary: str,
    asked: str,
    answer: str,
    *statuses: int,
    streams: bool = False,
    headers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    good = ok_of(answer)
    if streams:
        good = {**good, "content": {**good["content"], "text/event-stream": {}}}
        good["description"] = "The answer; with stream: true, server-sent events."
    if headers:
        good["headers"] = dict(headers)
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "requestBody": body_of("application/json", {"$ref": REF.format(model=asked)}),
            "responses": {"200": good, **errors_of(*statuses)},
        }
    }


def get_of(
    name: str, summary: str, model: str, *statuses: int, parameters: list[Any] | None = None
) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        **({"parameters": parameters} if parameters else {}),
        "responses": {"200": ok_of(model), **errors_of(401, 403, *statuses)},
    }


def metrics_path() -> dict[str, Any]:
    text = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    responses = {"200": text, **errors_of(401, 403)}
    return {
        "get": {"operationId": "metrics", "summary": "Prometheus metrics.", "responses": responses}
    }


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
