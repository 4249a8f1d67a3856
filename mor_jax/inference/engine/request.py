"""Requests to the engine, and the events it returns: tokens, scores and the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from mor_jax.errors import UserError


@dataclass(frozen=True)
class Drawing:
    """How a request's tokens are drawn. All of it is data to the compiled program: no value
    compiles anything anew.

    A draw at position t uses the key fold_in(key(seed), t): what else is in flight has no part in
    it.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # drops tokens less likely than min_p times the most likely
    presence_penalty: float = 0.0  # of generated tokens, as OpenAI has it
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # of prompt and generated tokens, as CTRL has it
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class DepthWish:
    """Recursions of a request's tokens; None: as the model was configured
    (`dial.depth_control`)."""

    mean: float | None = None
    least: int | None = None
    most: int | None = None


class Grammar(Protocol):
    """Which tokens may come next, of one request; advanced token by token on the host."""

    def allowed(self) -> Any:
        """Bit mask over the vocabulary, uint32 [ceil(V / 32)], bit t % 32 of word t // 32 set:
        token t may come."""

    def advance(self, token: int) -> None:
        """The token was drawn."""

    @property
    def finished(self) -> bool:
        """Nothing more may come: the request ends with "stop"."""


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Stop *strings* are the caller's: whoever turns tokens into text sees them and cancels with
    `Ticket.finish`.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    drawing: Drawing = field(default_factory=Drawing)
    stop_tokens: frozenset[int] = frozenset()  # end of text included, if it shall end the request
    min_tokens: int = 0  # stop tokens cannot be drawn before this many
    # None: none; n: the drawn token's, and the n most likely ones beside it
    logprobs: int | None = None
    prompt_logprobs: bool = False  # also those of the prompt's tokens (`logprobs` must be given)
    prompt_depths: bool = False  # a `PromptRead` before the first token
    grammar: Grammar | None = None
    depth: DepthWish = field(default_factory=DepthWish)
    priority: int = 0  # lower runs earlier, as in vLLM; ties by arrival
    deadline_s: float | None = None  # from submission; it then ends with reason "deadline"


class Token(NamedTuple):
    """One drawn token. `depth`: recursions the model ran to draw it, that is the depth of the token
    before it."""

    id: int
    depth: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # most likely first
    stopped: bool = False  # it is a stop token: not part of the text


class PromptScored(NamedTuple):
    """Log-probabilities of the prompt's tokens, before the first `Token`; the first token has
    none."""

    logprobs: tuple[float | None, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]


class PromptRead(NamedTuple):
    """Recursions that the prompt's tokens ran, all but the last one's: that is the first `Token`'s
    depth."""

    depths: tuple[int, ...]


class Finished(NamedTuple):
    """The last event of every request."""

    reason: str  # "stop" · "length" · "cancelled" · "deadline" · "error"
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    completion_tokens: int
    mean_depth: float  # over prompt tokens that were computed and drawn tokens; nan: nothing ran
    queued_s: float  # from submission to its first prefill
    preempted: int = 0  # times it gave its memory up and was computed again
    error: str | None = None


Event = Token | PromptScored | PromptRead | Finished


class Ticket(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """Free its lane at the next tick; its last event is Finished("cancelled"). Any thread;
        idempotent."""

    def finish(self) -> None:
        """As `cancel`, but it ends with "stop": the caller has what it wanted (a stop string was
        seen)."""


# called in the engine's thread, once a tick at most; must not block
OnEvents = Callable[[list[Event]], None]


class QueueFull(UserError):
    """The queue is full. Try again after `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Service(Protocol):
    """An engine that runs by itself (a thread of its own)."""

    def submit(self, request: Request, on_events: OnEvents) -> Ticket:
        """Raises UserError (a request that can never run, both numbers in the message), QueueFull,
        or UserError when the service is closing. May be called from any thread; returns at once."""

    def stats(self) -> dict[str, float]:
        """A snapshot of gauges and counters, by the names of docs/serving.md."""

    def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses new requests and waits for those that run. Returns True if all of them ended."""

    def close(self) -> None:
        """Stops at once. Requests under way end with Finished("error")."""
