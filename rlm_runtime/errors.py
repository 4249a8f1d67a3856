"""Errors a person, or a calling program, is meant to read. All derive from `RlmError`."""

from __future__ import annotations


class RlmError(Exception):
    """Anything `rlm_runtime` raises on purpose; the message names the thing, what was expected and
    what to do."""


class UsageError(RlmError):
    """A wrong argument: unknown model, impossible option, schema that is no schema."""


class ContextError(RlmError):
    """A context that cannot be read: missing file, binary file, unsupported type."""


class SandboxError(RlmError):
    """A required sandbox layer is missing, or the worker cannot be started."""


class LMError(RlmError):
    """A language-model call that failed for good, after retries.

    `kind`: auth | not_found | rate_limit | timeout | connection | bad_request | context_overflow |
    server | protocol | empty (a reply without text) | truncated (cut before its first word, while
    thinking) | content_filter.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str = "server",
        status: int | None = None,
        model: str | None = None,
    ):
        super().__init__(message)
        self.kind, self.status, self.model = kind, status, model


class BudgetExceeded(RlmError):
    """A call was refused because a limit of the run would be exceeded. `limit` is the field of
    `Budget`."""

    def __init__(self, limit: str, used: float, allowed: float, message: str | None = None):
        super().__init__(message or f"budget: {limit} is used up ({used:g} of {allowed:g}).")
        self.limit, self.used, self.allowed = limit, used, allowed


class Cancelled(RlmError):
    """The run was cancelled."""
