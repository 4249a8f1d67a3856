"""A model as the server sees it: tokenizer, window, template, and an engine with its own thread.

The classes of the engine's requests and events are handed in (`ModelBackend.engine_types`), so that
nothing here imports JAX.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlm_runtime.serve.http.errors import ApiError


class Stream(Protocol):
    """Token by token decoding; a character appears when its last byte has come."""

    def push(self, token: int) -> str: ...

    def flush(self) -> str: ...


class Tokenizer(Protocol):
    """Text <-> ids in [0, vocab_size). `piece` gives the bytes of a token, b"" for a special
    one."""

    vocab_size: int
    bos: int
    eos: int

    @property
    def ends(self) -> frozenset[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def prompt(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def piece(self, token: int) -> bytes: ...

    def token_text(self, token: int) -> str: ...

    @property
    def specials(self) -> Mapping[str, int]: ...

    def stream(self) -> Stream: ...


class Template(Protocol):
    """Messages to token ids. `ids` raises `EngineTypes.UserError` where the template cannot be
    applied.

    `source`: its text. `stops`: strings that end a reply. `plain`: whether a reply starts with a
    space to be removed.
    """

    source: str
    stops: tuple[str, ...]
    plain: bool

    def ids(
        self,
        tokenizer: Any,
        messages: Sequence[Mapping[str, Any]],
        *,
        opened: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]: ...

    def stop_tokens(self, tokenizer: Any) -> frozenset[int]: ...


class Ticket(Protocol):
    """A sequence under way; both may be called from any thread, and more than once."""

    def cancel(self) -> None: ...

    def finish(self) -> None: ...


class Service(Protocol):
    """The engine. `submit` returns at once; its events come in the engine's thread, once a tick at
    most."""

    def submit(self, request: Any, on_events: Callable[[list[Any]], None]) -> Ticket: ...

    def stats(self) -> Mapping[str, float]: ...

    def drain(self, timeout_s: float | None = None) -> bool: ...

    def close(self) -> None: ...


class Grammars(Protocol):
    """Makes the constraint of one sequence; raises `EngineTypes.UserError` for one that cannot be
    compiled."""

    def json_schema(self, schema: dict[str, Any]) -> Any: ...

    def json_object(self) -> Any: ...

    def regex(self, pattern: str) -> Any: ...

    def choice(self, options: Sequence[str]) -> Any: ...


class EngineTypes(Protocol):
    """The engine's own classes, by these names (a module will do)."""

    Request: Any
    Drawing: Any
    DepthWish: Any
    Token: Any
    PromptScored: Any
    Finished: Any
    UserError: Any
    QueueFull: Any


@dataclass(frozen=True)
class ModelBackend:
    """One model under the name a client asks for.

    `window`: tokens a sequence may have, prompt and reply together. `recursions`: the most a token
    can run.
    `grammars`: None where constrained output is not to be had; `no_grammars` then says why.
    """

    name: str
    tokenizer: Tokenizer
    window: int
    service: Service
    engine_types: EngineTypes
    template: Template
    recursions: int = 1
    grammars: Grammars | None = None
    no_grammars: str = "This server was started without constrained output."

    def alive(self) -> bool:
        """False once the engine has failed. An engine that cannot tell is taken to live."""
        flag = getattr(self.service, "healthy", True)
        return bool(flag() if callable(flag) else flag)


class ModelRegistry:
    """The models of a server, and whether they are loading, loaded or failed."""

    def __init__(self) -> None:
        self.models: dict[str, ModelBackend] = {}
        self.failure: BaseException | None = None
        self.loaded = threading.Event()

    def fill(self, load: Callable[[], Sequence[ModelBackend]]) -> None:
        """Loads and warms up the models; blocking. An error is kept in `failure`."""
        try:
            models = load()
            by_name = {m.name: m for m in models}
            if not models or len(by_name) != len(models):
                raise ValueError("Models need names that differ, and there must be one at least.")
            self.models = by_name
        except BaseException as error:
            self.failure = error
        finally:
            self.loaded.set()

    def check(self) -> None:
        """Raises ApiError (503) unless all models are there and alive."""
        if not self.loaded.is_set():
            text = "The models are still being loaded and warmed up."
            raise ApiError(503, text, code="warming_up", headers={"Retry-After": "5"}, close=True)
        if self.failure is not None:
            raise ApiError(503, "The models could not be loaded.", code="not_loaded", close=True)
        for model in self.models.values():
            if not model.alive():
                raise ApiError(
                    503, f"The engine of {model.name} has failed.", code="engine_dead", close=True
                )

    def close(self) -> None:
        for model in self.models.values():
            model.service.close()
