"""All errors in OpenAI's format, without internal details of the server."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rlm_runtime.errors import (
    BudgetExceeded,
    Cancelled,
    ContextError,
    LMError,
    RlmError,
    SandboxError,
    UsageError,
)

log = logging.getLogger("rlm_runtime.serve")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ErrorDetail(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    error: ErrorDetail


class ApiError(Exception):
    """An error a client gets: status, message, and the field that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        if close:  # the rest of the body will not be read
            self.headers["Connection"] = "close"

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        detail = ErrorDetail(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def refuse(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def stopping(*, close: bool = False) -> ApiError:
    return ApiError(
        503, "The server is stopping.", code="draining", headers={"Retry-After": "5"}, close=close
    )


def no_such_model(name: str, models: Iterable[str]) -> ApiError:
    there = ", ".join(sorted(models)[:20])
    text = f"The model {name[:100]!r} does not exist here. There are: {there}."
    return ApiError(404, text, param="model", code="model_not_found")


def from_validation(error: ValidationError) -> ApiError:
    """The first thing wrong, by the path of its field. The value itself is not repeated: it may be
    a prompt."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return refuse(f"The body is not JSON: {first['msg']}.", code="invalid_json")
    place = ".".join(str(p) for p in first["loc"]) or None
    missing = first["type"] == "missing"
    message = f"{place or 'The body'}: {first['msg']}." + (
        f" {error.error_count() - 1} more." if error.error_count() > 1 else ""
    )
    return refuse(
        message, place, "missing_required_parameter" if missing else "invalid_type_or_value"
    )


def from_run(error: BaseException) -> ApiError:
    """What a failed run looks like to the client. Anything not raised on purpose is an opaque
    500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):  # a client knows its file by name, not where it lies here
        return refuse(re.sub(r"/\S*/(?=[^/\s]+)", "", str(error)), "messages", "invalid_context")
    if isinstance(error, UsageError):
        return refuse(str(error))
    if isinstance(error, BudgetExceeded):
        return refuse(str(error), "rlm.budget", "budget_exceeded")
    if isinstance(error, SandboxError):
        log.error("no sandbox: %s", error)
        return ApiError(
            503, "The sandbox cannot be started on this server.", code="sandbox_unavailable"
        )
    if isinstance(error, LMError):
        # The message of an endpoint can quote its key or address: the client gets the kind, the log
        # has the rest.
        log.warning(
            "language model failed (%s, status %s, %s)", error.kind, error.status, error.model
        )
        if error.kind == "rate_limit":
            text = "The language model behind this server is rate limited."
            return ApiError(429, text, code="upstream_rate_limit", headers={"Retry-After": "10"})
        if error.kind == "timeout":
            return ApiError(
                504,
                "The language model behind this server did not answer in time.",
                code="upstream_timeout",
            )
        return ApiError(
            502,
            f"The language model behind this server failed ({error.kind}).",
            code=f"upstream_{error.kind}",
        )
    if isinstance(error, Cancelled):
        return ApiError(
            503, "The run was cancelled because the server is stopping.", code="cancelled"
        )
    cause = (
        error.__cause__ if isinstance(error, RlmError) and error.__cause__ is not None else error
    )
    log.error("unexpected %s in a run, at %s", type(cause).__name__, _place(cause))
    return ApiError(500, "Internal error.", code="internal_error")


def _place(error: BaseException) -> str:
    """Where it was raised, without its message: that can quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown route, wrong method, malformed multipart."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        text = f"There is nothing at {request.method} {request.url.path[:200]}; see /openapi.json."
        return ApiError(404, text, code="unknown_url").response()
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        text = f"{request.url.path[:200]} does not take {request.method[:20]}; it takes {allowed}."
        return ApiError(
            405, text, code="method_not_allowed", headers=dict(error.headers or {})
        ).response()
    return ApiError(
        error.status_code, str(error.detail), headers=dict(error.headers or {})
    ).response()


async def on_crash(request: Request, error: Exception) -> Response:
    return from_run(error).response()
