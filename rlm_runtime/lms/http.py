"""JSON over HTTP to one model endpoint: connections, retries, limits, deadlines, and errors a
person can act on.

The client is aiohttp: of the four that were measured it alone stays far below the time budget of a
hundred calls at once, with an import no dearer than the others' import and first request together.
It is imported at the first call.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import importlib
import itertools
import json
import logging
import os
import random
import re
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlencode, urlsplit

from rlm_runtime.errors import LMError, UsageError
from rlm_runtime.lms import sse
from rlm_runtime.lms.limits import Bucket, Gate, Pause
from rlm_runtime.lms.redact import Redactor
from rlm_runtime.replies import pieces
from rlm_runtime.replies.reader import Pace, beside, size_of

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
log = logging.getLogger("rlm_runtime.lms")

RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})
KINDS = {401: "auth", 403: "auth", 404: "not_found", 408: "timeout", 429: "rate_limit"}
LARGEST_REPLY = 64 << 20  # bytes of a stream
LARGEST_BODY = 16 << 20  # bytes of a body, or of one event of a stream
LARGEST_TEXT = 4 << 20  # characters of one reply, its thinking and its tool calls included
INLINE = 1 << 16  # bytes that are decoded in the event loop; more on a reader's thread
LARGEST_ERROR = 64 << 10
DRAIN_SECONDS = 0.5  # for the end of a stream after its last event, to keep the connection
_OVERFLOW = re.compile(
    r"context[ _-]?(length|window|size)|maximum context|prompt is too long|too many (input )?tokens|exceed_context_size"
    r"|input is too long|max_model_len|input length .{0,40}exceeds?|longer than the (model|maximum)",
    re.IGNORECASE,
)


def warm(also: Callable[[], object] | None = None) -> None:
    """Import the client, and do what `also` does, in a thread, for a caller about to wait for
    something else."""
    if "aiohttp" in sys.modules and also is None:
        return

    def work() -> None:
        importlib.import_module("aiohttp")
        if also is not None:
            also()

    threading.Thread(target=work, name="rlm-import").start()


class EndpointError(LMError):
    """An LMError with what is needed to decide what to do about it."""

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        status: int | None = None,
        model: str | None = None,
        retry: bool = False,
        retry_after: float | None = None,
        code: str | None = None,
        param: str | None = None,
    ):
        super().__init__(message, kind=kind, status=status, model=model)
        self.retry, self.retry_after, self.code, self.param = retry, retry_after, code, param


class Delivery:
    """Hands a stream's text on, and knows whether any was: then the call cannot be tried again."""

    def __init__(self, on_text: Callable[[str], None] | None):
        self._on_text, self.chars = on_text, 0

    def __call__(self, piece: str) -> None:
        if piece and self._on_text:
            self.chars += len(piece)
            try:
                self._on_text(piece)
            except Exception as e:  # the caller's own, not to be taken for one of the connection
                raise OnTextFailed(e) from e


class OnTextFailed(Exception):
    """The caller's `on_text` raised `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class Response:
    """A successful answer whose body has not been read yet."""

    def __init__(self, response: aiohttp.ClientResponse, endpoint: Endpoint, pace: Pace):
        self._response, self._endpoint, self._pace = response, endpoint, pace
        self.content_type = response.content_type
        self.done = False  # the stream said [DONE]

    async def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises EndpointError (protocol)."""
        raw = b"".join([chunk async for chunk in self._chunks(LARGEST_BODY)])
        value = await _value_of(raw)
        if not isinstance(value, dict):
            raise self._endpoint.protocol(
                f"answered with no JSON object: {self._endpoint.start(raw)}"
            )
        return value

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(event name, JSON object) of each server-sent event, to [DONE] or the end. Raises
        EndpointError (protocol)."""
        stream = sse.events(self._chunks(LARGEST_REPLY), LARGEST_BODY)
        try:
            async for event in stream:
                if event.data.strip() == "[DONE]":
                    self.done = True
                    break
                value = await _value_of(event.data)
                if not isinstance(value, dict):
                    shown = self._endpoint.start(event.data[:LARGEST_ERROR].encode())
                    raise self._endpoint.protocol(f"streamed what is no JSON object: {shown}")
                yield event.event, value
                await self._pace.step()
            with contextlib.suppress(TimeoutError):  # then the connection is closed instead of kept
                async with asyncio.timeout(DRAIN_SECONDS):
                    async for _ in stream:
                        pass
        except sse.TooLong:
            raise self._too_much(LARGEST_BODY, "in one event") from None

    async def _chunks(self, most: int) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._response.content.iter_any():
            size += len(chunk)
            if size > most:
                raise self._too_much(most)
            yield chunk

    def _too_much(self, most: int, where: str = "") -> EndpointError:
        return self._endpoint.protocol(f"answered with more than {most >> 20} MiB {where}".rstrip())


async def _parts(raw: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(raw), pieces.PIECE):
        yield raw[at : at + pieces.PIECE]


async def _value_of(raw: bytes | str) -> Any:
    """The JSON value of a body or an event; None where it is none."""
    return await beside(_decoded, raw) if len(raw) > INLINE else _decoded(raw)


def _decoded(raw: bytes | str) -> Any:
    try:
        if len(raw) <= INLINE:
            return json.loads(raw)
        return pieces.loads(
            raw if isinstance(raw, str) else raw.decode(json.detect_encoding(raw), "surrogatepass")
        )
    except (ValueError, RecursionError):
        return None


class Room:
    """What one reply may still hold of text, thinking and tool calls."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint, self.used = endpoint, 0

    def take(self, chars: int) -> None:
        """Raises EndpointError (protocol) for more than LARGEST_TEXT characters."""
        self.used += chars
        if self.used > LARGEST_TEXT:
            raise self._endpoint.protocol(
                f"sent a reply of more than {LARGEST_TEXT >> 20} Mi characters"
            )


class Endpoint:
    """One base URL. Safe to use from several event loops at once; each has its own connections.

    Args:
      name: of the model, for messages: "openai:gpt-5-mini".
      headers, query: sent with every request. They go to this endpoint alone: redirects are not
        followed.
      secrets: what must not show in any message.
      timeout: seconds for a call with all its retries; not counted is waiting for the limits below.
      connect_timeout, read_timeout: seconds for a connection, and for silence while a reply is read
        (None: `timeout`).
      max_retries: after the first try.
      backoff, backoff_cap: the k-th retry waits a random time up to min(cap, backoff * 2**k)
        seconds ("full jitter"), or as long as the endpoint's Retry-After says.
      concurrency, requests_per_minute, tokens_per_minute: limits over all callers; None: none.
      hint: a sentence added when the endpoint cannot be reached; auth_hint: when it refuses the
        key.
      refused: messages that mean the request itself is refused, whatever the status; not retried.
    Raises:
      UsageError: a URL that is none, an option out of range.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        headers: dict[str, str],
        *,
        secrets: tuple[str, ...] = (),
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        read_timeout: float | None = None,
        max_retries: int = 4,
        backoff: float = 0.25,
        backoff_cap: float = 20.0,
        concurrency: int | None = 256,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        hint: str = "",
        auth_hint: str = "",
        query: Mapping[str, str] | None = None,
        refused: re.Pattern[str] | None = None,
    ):
        for label, value, least in (
            ("timeout", timeout, 0),
            ("connect_timeout", connect_timeout, 0),
            ("read_timeout", read_timeout, 0),
            ("concurrency", concurrency, 0),
            ("requests_per_minute", requests_per_minute, 0),
            ("tokens_per_minute", tokens_per_minute, 0),
            ("max_retries", max_retries, -1),
        ):
            if value is not None and not value > least:
                raise UsageError(f"{name}: {label} must be more than {least}, got {value!r}.")
        self.name, self.base_url = name, check_url(name, base_url)
        self.timeout, self.max_retries = timeout, max_retries
        self.gate, self.requests, self.tokens = (
            Gate(concurrency),
            Bucket(requests_per_minute),
            Bucket(tokens_per_minute),
        )
        self._headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            **headers,
        }
        self._query = "?" + urlencode(query) if query else ""
        self._auth_hint, self._refused = auth_hint, refused
        proxy = proxy_for(self.base_url)
        self.redact = Redactor(
            [*secrets, *_passwords(self.base_url), *(_passwords(proxy) if proxy else ())]
        )
        self._connect, self._read = connect_timeout, read_timeout or timeout
        self._backoff, self._cap, self._hint = backoff, backoff_cap, hint
        self._pause = Pause()
        self._clients: dict[asyncio.AbstractEventLoop, _Client] = {}
        self._lock = threading.Lock()  # several threads, each with its loop, may share a model

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[Response], Awaitable[T]],
        *,
        delivery: Delivery | None = None,
        tokens: int = 0,
    ) -> T:
        """What `read` makes of the answer to `body`.

        Args:
          delivery: once it has handed text on the call is not tried again.
          tokens: what the call is expected to use, for the limit by the minute.
        Raises:
          EndpointError: refused, unreachable, too slow, or not understood.
        """
        long = size_of(body, INLINE) >= INLINE
        raw = (
            await beside(pieces.dumps, body, pieces.WIDE)
            if long
            else pieces.dumps(body, pieces.WIDE)
        )
        url, delivery = self.base_url + path + self._query, delivery or Delivery(None)
        loop = asyncio.get_running_loop()
        error: EndpointError | None = None
        left, tries = self.timeout, 0  # waiting for our own limits costs none of it
        while True:
            await self.requests.wait(1)
            await self.tokens.wait(tokens)
            while (held := self._pause.remaining()) > 0:
                # or all of them would come back at once
                await asyncio.sleep(held * random.uniform(1.0, 1.2))
            async with self.gate:
                tries, began = tries + 1, loop.time()
                try:
                    async with asyncio.timeout(left) as limit:
                        return await self._try(url, raw, read)
                except EndpointError as e:
                    error = e
                except OnTextFailed as e:
                    raise e.error from None
                except TimeoutError:
                    if not limit.expired():
                        raise
                    before = f" The try before: {error}" if error else ""
                    where = show(self.base_url)
                    message = (
                        f"no answer from {where} within the timeout of {self.timeout:g} s.{before}"
                    )
                    error = self.error(message, "timeout")
            self.tokens.give_back(tokens)
            left -= loop.time() - began
            delay = random.uniform(0, min(self._cap, self._backoff * 2 ** (tries - 1)))
            if error.retry_after is not None and error.retry:
                delay = max(error.retry_after, delay)
                self._pause.extend(min(error.retry_after, self.timeout))
            left -= delay
            if not error.retry or delivery.chars or tries > self.max_retries or left <= 0:
                raise self._final(error, tries, delivery, delay)
            log.info("%s: try %d failed (%s), next in %.1f s", self.name, tries, error, delay)
            await asyncio.sleep(delay)

    async def _try(self, url: str, raw: bytes, read: Callable[[Response], Awaitable[T]]) -> T:
        import aiohttp

        client = await self._client()
        where = show(self.base_url)
        # In parts, where it is large: aiohttp would write it in one step.
        data = raw if len(raw) <= pieces.PIECE else _parts(raw)
        headers = {**self._headers, "Content-Length": str(len(raw))}
        try:
            request = client.session.post(
                url, data=data, headers=headers, proxy=client.proxy, allow_redirects=False
            )
            async with request as response:
                if response.status == 200:
                    return await read(Response(response, self, client.pace))
                raise self.refusal(response.status, await _beginning(response), response.headers)
        except aiohttp.ClientSSLError as e:
            error = self.error(f"no secure connection to {where}: {e}", "connection")
        except aiohttp.ClientConnectorError as e:
            why = _reason(e.os_error)
            error = self.error(
                f"cannot reach {where}: {why}. {self._hint}".strip(), "connection", retry=True
            )
        except aiohttp.ConnectionTimeoutError:
            message = f"cannot reach {where}: no connection within {self._connect:g} s. {self._hint}".strip()
            error = self.error(message, "connection", retry=True)
        except aiohttp.ServerTimeoutError:
            error = self.error(f"{where} was silent for {self._read:g} s.", "timeout", retry=True)
        # reset, cut in the middle of a body, no HTTP at all
        except (aiohttp.ClientError, OSError) as e:
            refused = isinstance(e, aiohttp.ClientResponseError | aiohttp.InvalidURL)
            why = self.redact(str(e)).split("\n")[0] or type(e).__name__
            kind = "protocol" if refused else "connection"
            error = self.error(f"{where} broke off: {why}.", kind, retry=not refused)
        # Raised out here, without the client's exception behind it: that holds the request, and so
        # the key.
        raise error

    def refusal(self, status: int, body: bytes, headers: Any = None) -> EndpointError:
        """The error an answer other than 200 means."""
        message, code, param = self._explained(body)
        overflow = (
            400 <= status <= 500
            and status != 429
            and (code == "context_length_exceeded" or _OVERFLOW.search(message))
        )
        refused = self._refused is not None and self._refused.search(message) is not None
        if 300 <= status < 400:
            target = show((headers or {}).get("Location", "elsewhere"))
            message, kind = f"redirects to {target}; give that as the base URL", "not_found"
        elif overflow or status == 413:
            kind = "context_overflow"
        elif code == "content_filter":
            kind = "content_filter"
        elif status >= 500 and refused:
            kind = "bad_request"
        elif 400 <= status < 500:
            kind = KINDS.get(status, "bad_request")
        else:
            kind = "server" if status >= 500 else "protocol"
        final = (
            overflow
            or refused
            or code in ("insufficient_quota", "billing_hard_limit_reached", "content_filter")
        )
        retry = status in RETRIED and not final
        if kind == "auth" and self._auth_hint:
            message = f"{message.rstrip('.')}. {self._auth_hint}"
        return self.error(
            f"{show(self.base_url)} answered {status}: {message}",
            kind,
            status=status,
            retry=retry,
            code=code,
            param=param,
            retry_after=retry_after(headers or {}),
        )

    def error(self, message: str, kind: str, **more: Any) -> EndpointError:
        return EndpointError(
            f"{self.name}: {self.redact(message)}", kind=kind, model=self.name, **more
        )

    def protocol(self, message: str, **more: Any) -> EndpointError:
        return self.error(f"{show(self.base_url)} {message}.", "protocol", **more)

    def cut(self) -> EndpointError:
        """The error of a stream that ended before its reply did."""
        return self.error(
            f"the stream from {show(self.base_url)} ended before the reply did.",
            "connection",
            retry=True,
        )

    def empty(self) -> EndpointError:
        """The error of an answer without a single choice: some gateways send it when the model
        behind them failed."""
        return self.error(
            f"{show(self.base_url)} sent a reply without any choice.", "empty", retry=True
        )

    def start(self, raw: bytes) -> str:
        """The beginning of a body for a message, on one line. Redacted before it is cut: half a key
        is one too."""
        text = " ".join(self.redact(raw[:LARGEST_ERROR].decode("utf-8", "replace")).split())
        return (text[:200] + "...") if len(text) > 200 else text or "(nothing)"

    def shown(self, value: Any) -> bytes:
        """A JSON value as the body of an error: what is long, only by its beginning."""
        if size_of(value, LARGEST_ERROR) < LARGEST_ERROR:
            return json.dumps(value).encode()
        return "".join(itertools.islice(json.JSONEncoder().iterencode(value), 200)).encode()[
            :LARGEST_ERROR
        ]

    def _explained(self, body: bytes) -> tuple[str, str | None, str | None]:
        """(message, code, parameter) of an error body, whatever its shape."""
        try:
            value = json.loads(body.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            value = None
        error = value.get("error", value) if isinstance(value, dict) else None
        if isinstance(error, str):
            return error, None, None
        if isinstance(error, dict):
            message = next(
                (error[k] for k in ("message", "detail", "error") if isinstance(error.get(k), str)),
                None,
            )
            code = next((error[k] for k in ("code", "type") if isinstance(error.get(k), str)), None)
            return (
                message or self.start(body),
                code,
                error["param"] if isinstance(error.get("param"), str) else None,
            )
        return self.start(body), None, None

    def _final(
        self, error: EndpointError, tries: int, delivery: Delivery, delay: float
    ) -> EndpointError:
        message = str(error).rstrip()
        if error.retry and delivery.chars:
            message += (
                f" Not tried again: {delivery.chars} characters of the reply had been handed on."
            )
        elif error.retry and tries > self.max_retries:
            message += f" Gave up after {tries} {'try' if tries == 1 else 'tries'}."
        elif error.retry:
            message += f" Not tried again: the wait of {delay:.0f} s would pass the timeout of {self.timeout:g} s."
        return EndpointError(
            message,
            kind=error.kind,
            status=error.status,
            model=error.model,
            code=error.code,
            param=error.param,
        )

    async def _client(self) -> _Client:
        """The running loop's client."""
        loop = asyncio.get_running_loop()
        held = self._clients.get(loop)
        if held is None:
            made = _Client(self)
            with self._lock:
                self._clients = {k: v for k, v in self._clients.items() if not k.is_closed()} | {
                    loop: made
                }
            held = made
            await held.open()
        return held

    async def aclose(self) -> None:
        """Close the running loop's connections. A later call opens new ones."""
        held = self._clients.get(asyncio.get_running_loop())
        if held:
            await held.aclose()

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            self._clients = {k: v for k, v in self._clients.items() if k is not loop}


class _Client:
    """The connections of one event loop, closed at the latest when `asyncio.run` shuts that loop
    down."""

    def __init__(self, endpoint: Endpoint):
        import aiohttp

        self._endpoint, self.pace = endpoint, Pace()
        self.proxy = proxy_for(endpoint.base_url)  # which the environment names for this URL
        self.session = aiohttp.ClientSession(
            # Servers drop idle connections after five seconds or more (uvicorn's default): let go
            # first.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.5, ttl_dns_cache=60),
            timeout=aiohttp.ClientTimeout(
                total=None, connect=endpoint._connect, sock_read=endpoint._read
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def open(self) -> None:
        # An asynchronous generator is the one thing that `asyncio.run` closes by itself before the
        # loop ends.
        self._keeper = self._keep()
        await anext(self._keeper)

    async def _keep(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            self._endpoint._forget(asyncio.get_running_loop())
            await self.session.close()

    async def aclose(self) -> None:
        await self._keeper.aclose()


async def _beginning(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > LARGEST_ERROR:
            break
    return body[:LARGEST_ERROR]


def _reason(error: OSError) -> str:
    if isinstance(error.errno, int) and error.errno > 0 and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def check_url(name: str, url: str) -> str:
    """`url` without a trailing slash. Raises UsageError unless it is an http(s) URL with a host."""
    try:
        parts = urlsplit(url.strip())
        parts.port  # noqa: B018 - raises on a port that is none
        good = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and not parts.query
            and not parts.fragment
        )
    except (ValueError, AttributeError):
        good = False
    if not good:
        raise UsageError(f"{name}: base_url must look like http://localhost:8000/v1, got {url!r}.")
    return url.strip().rstrip("/")


def check_key(name: str, key: str | None) -> str | None:
    """The key without surrounding white space. Raises UsageError (which does not show it) if it
    cannot be one."""
    key = (key or "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"{name}: the API key holds characters that no key has; was something else pasted with it?"
        )
    return key or None


def show(url: str) -> str:
    """The URL without a user name and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def same_origin(one: str, other: str) -> bool:
    """Whether two URLs name the same scheme, host and port: what may receive the same key."""
    a, b = (urlsplit(url.strip()) for url in (one, other))
    default = {"http": 80, "https": 443}
    try:
        ports = [p.port or default.get(p.scheme) for p in (a, b)]
    except ValueError:
        return False
    return a.scheme == b.scheme and a.hostname == b.hostname and ports[0] == ports[1]


def _passwords(url: str) -> list[str]:
    password = urlsplit(url).password or ""
    return [password, unquote(password)]


def proxy_for(url: str) -> str | None:
    """The proxy of HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    if not proxies or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


def retry_after(headers: Any) -> float | None:
    """Seconds a Retry-After header asks for: a number or a date; None: no usable header."""
    try:
        if "retry-after-ms" in headers:
            return _seconds(float(headers["retry-after-ms"]) / 1000)
        value = headers.get("Retry-After")
        if value is None:
            return None
        try:
            return _seconds(float(value))
        except ValueError:
            return _seconds(email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _seconds(value: float) -> float | None:
    return max(0.0, value) if value < float("inf") else None
