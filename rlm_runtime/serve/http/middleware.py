"""The middleware of every server: request id, checks of host, origin, key and body, and one log
line.

It is pure ASGI, so streams and disconnects pass through it unchanged. The log has no header, body
or query.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlm_runtime.serve.http.errors import ApiError, from_run
from rlm_runtime.serve.http.settings import HttpSettings

log = logging.getLogger("rlm_runtime.serve")

OPEN = frozenset({"/health", "/ready", "/openapi.json"})
PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """Checks a request and logs it. Sets in the scope: `rlm.request_id` and `rlm.owner` (a digest
    of the key; "" where none is asked for)."""

    def __init__(self, app: ASGIApp, *, settings: HttpSettings, count: Callable[[str, int], None]):
        self.app, self.settings, self.count = app, settings, count
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if PLAIN_ID.fullmatch(given) else "req_" + secrets.token_hex(12)
        scope["rlm.request_id"] = request_id
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = request_id
                out["X-Content-Type-Options"] = "nosniff"
                out.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            try:
                self._check(scope, headers)
                limit = (
                    self.settings.file_bytes + (1 << 20)
                    if _is_upload(scope)
                    else self.settings.body_bytes
                )
                await self.app(scope, _Body(receive, headers, limit, self.settings), answer)
            except Exception as error:
                api = error if isinstance(error, ApiError) else from_run(error)
                if status:  # the answer has begun: all that is left is to break it off
                    raise
                await api.response()(scope, receive, answer)
        finally:
            route = getattr(scope.get("endpoint"), "__name__", "none")
            self.count(route, status)
            path = scope["path"][:100]
            shown = path if path.isprintable() else repr(path)
            log.info(
                "%s %s %s %d %.3fs",
                request_id,
                scope["method"][:16],
                shown,
                status,
                time.monotonic() - began,
            )

    def _check(self, scope: Scope, headers: Headers) -> None:
        allowed = self.settings.allowed_hosts
        host = headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if "*" not in allowed and name not in allowed:
            text = "This server does not go by the name in the Host header; it can be allowed with --allowed-host."
            raise ApiError(403, text, code="host_not_allowed", close=True)
        origin = headers.get("origin")
        if origin and not self._origin_ok(origin, host):
            text = "Web pages of other origins may not call this server; they can be allowed with --cors-origin."
            raise ApiError(403, text, code="origin_not_allowed", close=True)
        scope["rlm.owner"] = ""
        if not self._keys or scope["path"] in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # all of them, in equal time
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            what = (
                "Wrong API key."
                if key
                else "An API key is needed: send it as `Authorization: Bearer KEY`."
            )
            raise ApiError(
                401,
                what,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
                close=True,
            )
        scope["rlm.owner"] = digest.hex()[:32]

    def _origin_ok(self, origin: str, host: str) -> bool:
        allowed = self.settings.cors_origins
        return "*" in allowed or origin in allowed or origin.partition("://")[2] == host


class _Body:
    """`receive` with a bound on the size and the pace of the body; silent waiting afterwards is not
    bounded."""

    def __init__(self, receive: Receive, headers: Headers, limit: int, settings: HttpSettings):
        self._receive, self._limit, self._settings = receive, limit, settings
        self._declared = headers.get("content-length", "")
        self._read = 0
        self._began: float | None = None
        self._done = False

    async def __call__(self) -> Message:
        if self._done:
            return await self._receive()
        if self._declared.isdigit() and int(self._declared) > self._limit:
            raise self._too_large(int(self._declared))
        now = time.monotonic()
        self._began = self._began or now
        idle = self._settings.body_idle_seconds
        deadline = self._began + idle + self._read / self._settings.body_pace
        try:
            async with asyncio.timeout(min(idle, max(0.0, deadline - now))):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "The body of the request came too slowly.", code="body_timeout", close=True
            ) from None
        if message["type"] != "http.request" or not message.get("more_body"):
            self._done = True
        self._read += len(message.get("body", b""))
        if self._read > self._limit:
            raise self._too_large(self._read)
        return message

    def _too_large(self, size: int) -> ApiError:
        text = f"The body has {size:,} bytes or more; the limit is {self._limit:,}. Upload long material to /v1/files."
        return ApiError(413, text, code="body_too_large", close=True)


def _is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"] == "/v1/files")
