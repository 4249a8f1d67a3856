"""What every model behind HTTP shares: its options, its key, the retry loop, and adapting to what
an endpoint refuses.

A provider is a subclass that says where it lives (class variables), how a request looks (`body`),
how a reply is read (`read`), and what to leave out when the endpoint refuses a request (`adapt`).
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlm_runtime.errors import UsageError
from rlm_runtime.lms import prices, tokens
from rlm_runtime.lms.base import DEFAULT_SAMPLING, Message, Reply, Sampling, ToolSpec
from rlm_runtime.lms.http import (
    Delivery,
    Endpoint,
    EndpointError,
    Response,
    check_key,
    check_url,
    same_origin,
    show,
    warm,
)
from rlm_runtime.lms.redact import is_secret_name

log = logging.getLogger("rlm_runtime.lms")

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass
class Call:
    """One call of `complete`, with the model's own defaults already in `sampling`."""

    messages: Sequence[Message]
    sampling: Sampling
    tools: Sequence[ToolSpec]
    schema: dict[str, Any] | None
    no_format: bool = False  # a refusal that names nothing may mean response_format


class ChatLM:
    """A chat model behind HTTP.

    Args:
      model: as the endpoint calls it.
      base_url: of the endpoint; default: the provider's variable, else the provider's own.
      api_key: of this endpoint. api_key_env: the variable that holds it. Default: the provider's
        variable, but only where `base_url` has the origin of the provider's URL variable, or of the
        provider's own endpoint without one: a key is never sent to an endpoint that it was not
        given for.
      headers, query: sent with every request (`query={"api-version": "2024-10-21"}`).
      extra_body: fields for every request ({"top_k": 20}); `Sampling.extra` goes on top.
      temperature, top_p, seed, max_tokens: of a reply, where the sampling of a call does not say.
      reasoning_effort: one of none, minimal, low, medium, high, xhigh, max; what exists depends on
        the model.
      stream: ask for a stream even where nobody watches it, so that a proxy sees a connection in
        use.
      window: tokens the model holds; default: of the price table, else unknown.
      price: see `prices.price_of`.
      tokenizer: exact number of tokens of a text; default: the estimate of `tokens`.
      **http: timeout, connect_timeout, read_timeout, max_retries, backoff, backoff_cap,
        concurrency, requests_per_minute, tokens_per_minute: see `http.Endpoint`.
    Raises:
      UsageError: no key for the provider's own endpoint, a URL that is none, an option out of
        range.
    """

    provider: str  # the part of `name` before the colon
    official: ClassVar[str]  # base URL of the provider's own endpoint
    key_variable: ClassVar[str]
    url_variable: ClassVar[str]
    path: ClassVar[str]  # of the request, after the base URL

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        api_key_env: str | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        reasoning_effort: str | None = None,
        stream: bool = True,
        window: int | None = None,
        price: Any = None,
        tokenizer: Callable[[str], int] | None = None,
        **http: Any,
    ):
        self.model, self.name = model, f"{self.provider}:{model}"
        if max_tokens is not None and not (isinstance(max_tokens, int) and max_tokens >= 1):
            raise UsageError(f"{self.name}: max_tokens must be at least 1, got {max_tokens}.")
        if reasoning_effort is not None and reasoning_effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            raise UsageError(
                f"{self.name}: reasoning_effort must be one of {known}, got {reasoning_effort!r}."
            )
        headers, query = self._texts("headers", headers), self._texts("query", query)
        url = check_url(self.name, base_url or os.environ.get(self.url_variable) or self.official)
        key = self._key(url, api_key, api_key_env)
        withheld = key is None and api_key is None and bool(os.environ.get(self.key_variable))
        if self.is_official(url) and not key:
            raise UsageError(
                f"{self.name}: no API key. {self._why_no_key(url) if withheld else f'Set {self.key_variable}'} or pass "
                f"api_key=; for a server of your own pass base_url= or set {self.url_variable}."
            )
        named = {**headers, **query, **(extra_body or {})}
        secrets = [
            v
            for n, v in named.items()
            if isinstance(v, str) and (is_secret_name(n) or n in headers)
        ]
        self.endpoint = Endpoint(
            self.name,
            self.root_of(url),
            {**self.auth(key), **headers},
            query=query,
            secrets=(key or "", *(v for v in secrets if len(v) >= 8)),
            hint="Is the server running, and base_url right?",
            auth_hint=self._why_no_key(url) + "." if withheld else "",
            refused=self.refused,
            **http,
        )
        self._defaults = {
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "max_tokens": max_tokens,
        }
        self._effort, self._stream, self._extra = reasoning_effort, stream, dict(extra_body or {})
        self._table = prices.Table(self.name, url, given=price, window=window)
        self._tokenizer = tokenizer or tokens.estimate
        self.adapted: set[str] = set()  # what this endpoint turned out not to take

    refused: ClassVar[re.Pattern[str] | None] = None  # see `Endpoint`

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r}, base_url={show(self.endpoint.base_url)!r})"

    # -- of a provider -----------------------------------------------------------------------------
    def auth(self, key: str | None) -> dict[str, str]:
        """The headers that carry the key."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def root_of(self, url: str) -> str:
        """The URL that `path` is appended to."""
        return url

    def body(self, call: Call) -> dict[str, Any]:
        """The request."""
        raise NotImplementedError

    async def read(
        self, response: Response, body: dict[str, Any], call: Call, delivery: Delivery
    ) -> Reply:
        """The reply. Raises EndpointError."""
        raise NotImplementedError

    def adapt(self, error: EndpointError, body: dict[str, Any], call: Call) -> str | None:
        """Note in `adapted` (or in `call`) what to leave out after this refusal, and name it; None:
        nothing helps."""
        return None

    def worked(self, call: Call) -> None:
        """Called after a reply, to keep what was only supposed."""

    # -- the LM protocol ---------------------------------------------------------------------------
    @property
    def window(self) -> int | None:
        """Tokens the model holds, prompt and reply; None: unknown."""
        return self._table.window

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling = DEFAULT_SAMPLING,
        tools: Sequence[ToolSpec] = (),
        schema: dict[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """One reply. Its text goes to `on_text` as it arrives.

        Raises:
          LMError: see `LMError.kind`.
        """
        delivery = Delivery(on_text)
        left_open = {
            n: v
            for n, v in self._defaults.items()
            if v is not None and getattr(sampling, n) is None
        }
        call = Call(
            messages,
            sampling.model_copy(update=left_open) if left_open else sampling,
            tools,
            schema,
        )
        expected = self.count_tokens(messages) + (call.sampling.max_tokens or 0)
        left_out: set[str] = set()
        while True:
            body = self.body(call)
            read = functools.partial(self.read, body=body, call=call, delivery=delivery)
            try:
                reply = await self.endpoint.post(
                    self.path, body, read, delivery=delivery, tokens=expected
                )
            except EndpointError as e:
                if delivery.chars or e.kind == "context_overflow":
                    raise
                field = self.adapt(e, body, call)
                if field is None or field in left_out:
                    raise
                left_out.add(field)
                continue
            self.worked(call)
            self.endpoint.tokens.give_back(
                expected - reply.usage.input_tokens - reply.usage.output_tokens
            )
            return reply

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """With a tokenizer its count and a frame for each message, else the upper estimate of
        `tokens`."""
        return tokens.count(messages, self._tokenizer)

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float | None:
        price = self._table.price
        return price.dollars(input_tokens, output_tokens, cached_tokens) if price else None

    def warm(self) -> None:
        """Begin, in the background, what the first call would have to wait for."""
        warm(self._table.warm)

    async def aclose(self) -> None:
        """Close the connections of the running event loop; the model stays usable."""
        await self.endpoint.aclose()

    # -- inside ------------------------------------------------------------------------------------
    def is_official(self, url: str) -> bool:
        return same_origin(url, self.official)

    @property
    def streams(self) -> bool:
        return self._stream and "stream" not in self.adapted

    def _texts(self, what: str, given: Mapping[str, str] | None) -> dict[str, str]:
        if given is not None and not (
            isinstance(given, Mapping)
            and all(isinstance(t, str) for pair in given.items() for t in pair)
        ):
            raise UsageError(
                f"{self.name}: {what} must be a mapping of texts to texts, got {type(given).__name__}."
            )
        return dict(given or {})

    def _key(self, url: str, given: str | None, variable: str | None) -> str | None:
        """The key for the endpoint at `url`."""
        if given is not None:
            return check_key(self.name, given)
        if variable is not None:
            if not os.environ.get(variable):
                raise UsageError(
                    f"{self.name}: api_key_env names {variable}, but no such variable is set."
                )
            return check_key(self.name, os.environ[variable])
        return (
            check_key(self.name, os.environ.get(self.key_variable)) if self._is_home(url) else None
        )

    def _home(self) -> str:
        """The endpoint that the key in the environment was given for."""
        return os.environ.get(self.url_variable) or self.official

    def _is_home(self, url: str) -> bool:
        return same_origin(url, self._home())

    def _why_no_key(self, url: str) -> str:
        return (
            f"{self.key_variable} was not sent to {show(url)}: it belongs to {show(self._home())}. Give this endpoint its "
            "own key: api_key= or api_key_env="
        )
