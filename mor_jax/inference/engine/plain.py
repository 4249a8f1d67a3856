"""The engine's surface in its plainest form: one request at a time, by plain decode, drawn on the
host.

Slow and simple, so that it can be read: the oracle that the batching engine is held to, and good
enough to try a server on. One thread; the queue is bounded; grammars, penalties and
log-probabilities as `request.py` has them.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.errors import UserError
from mor_jax.inference.decode import decode_step, prefill
from mor_jax.inference.dial import depth_control
from mor_jax.inference.engine.request import (
    Drawing,
    Event,
    Finished,
    OnEvents,
    PromptRead,
    PromptScored,
    QueueFull,
    Request,
    Token,
)
from mor_jax.model.lm import CAUSAL, LM


class PlainTicket:
    """See `request.Ticket`."""

    def __init__(self, request: Request, on_events: OnEvents):
        self.request, self.on_events, self.came = request, on_events, time.monotonic()
        self.wish: str | None = None  # how its owner wants it ended

    def cancel(self) -> None:
        self.wish = self.wish or "cancelled"

    def finish(self) -> None:
        self.wish = self.wish or "stop"


class PlainService:
    """See `request.Service`.

    Args:
      model: of `train.load.load_model`; or anything with lm, params, mesh and a tokenizer.
      queue: requests that may wait; more are refused.
      context: longest sequence; the model's by default.
    `hold` is for tests: while it is cleared, no token is drawn.
    """

    def __init__(self, model: Any, *, queue: int = 64, context: int | None = None):
        self._model, self._queue_limit = model, queue
        self.context = min(context or model.lm.model.context, model.lm.model.context)
        self._vocab = model.tokenizer.vocab_size
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, PlainTicket]] = []
        self._order = itertools.count()
        self._running: PlainTicket | None = None
        self._closing: str | None = None
        self._failure: str | None = None
        self._counts = {"generation_steps_total": 0.0}
        self.hold = threading.Event()
        self.hold.set()
        self._thread = threading.Thread(target=self._work, name="plain engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._failure is None

    def submit(self, request: Request, on_events: OnEvents) -> PlainTicket:
        self._check(request)
        ticket = PlainTicket(request, on_events)
        with self._changed:
            if self._failure is not None:
                raise UserError(f"the engine has failed: {self._failure}. Start it again.")
            if self._closing is not None:
                raise UserError("the engine is closing; it accepts nothing more.")
            if len(self._waiting) >= self._queue_limit:
                raise QueueFull(
                    f"{len(self._waiting)} requests wait already.", 1.0 + len(self._waiting)
                )
            heapq.heappush(self._waiting, (request.priority, next(self._order), ticket))
            self._changed.notify_all()
        return ticket

    def stats(self) -> dict[str, float]:
        with self._changed:
            running = float(self._running is not None)
            return {
                **self._counts,
                "num_requests_running": running,
                "lane_occupancy": running,
                "num_requests_waiting": float(len(self._waiting)),
            }

    def drain(self, timeout_s: float | None = None) -> bool:
        with self._changed:
            self._closing = self._closing or "drain"
            return self._changed.wait_for(
                lambda: not self._waiting and self._running is None, timeout_s
            )

    def close(self) -> None:
        with self._changed:
            self._closing = "close"
            self._changed.notify_all()
        self.hold.set()
        self._thread.join(60)

    def warm_up(self) -> None:
        """Run one request; the prefill of a longer prompt is compiled when it comes."""
        done = threading.Event()

        def take(events: list[Event]) -> None:
            if isinstance(events[-1], Finished):
                done.set()

        self.submit(Request((0,), min(2, self.context - 1)), take)
        done.wait()

    # ---- the thread

    def _check(self, request: Request) -> None:
        room = self.context - len(request.prompt)
        if not request.prompt or request.max_tokens < 1:
            raise UserError(
                "a request needs a prompt of one token at least, and max_tokens of 1 at least."
            )
        if room < request.max_tokens:
            raise UserError(
                f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} more are asked for; the context "
                f"is {self.context}. Shorten one of them."
            )
        self._control(request)

    def _control(self, request: Request) -> Any:
        wish = request.depth
        if wish.mean is None and wish.least is None and wish.most is None:
            return None
        return depth_control(
            self._model.lm,
            self._model.params,
            1,
            mean_depth=wish.mean,
            min_depth=wish.least,
            max_depth=wish.most,
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closing == "close")
                if self._closing == "close":
                    left, self._waiting = [t for *_, t in self._waiting], []
                    break
                *_, ticket = heapq.heappop(self._waiting)
                self._running = ticket
            try:
                with jax.set_mesh(self._model.mesh):
                    for events in self._serve(ticket):
                        ticket.on_events(events)
            except Lost as e:
                ticket.on_events([self._finished(ticket, "error", error=str(e))])
            except Exception as e:
                self._failure = f"{type(e).__name__}: {e}"
                ticket.on_events([self._finished(ticket, "error", error=self._failure)])
        for ticket in left:
            ticket.on_events([self._finished(ticket, "error", error="the engine was closed")])

    def _finished(
        self,
        ticket: PlainTicket,
        reason: str,
        *,
        drawn: int = 0,
        depths: Any = (),
        queued: float = 0.0,
        error: str | None = None,
    ) -> Finished:
        mean = float(np.mean(depths)) if len(depths) else math.nan
        return Finished(reason, len(ticket.request.prompt), 0, drawn, mean, queued, error=error)

    def _serve(self, ticket: PlainTicket) -> Iterator[list[Event]]:
        request, queued = ticket.request, time.monotonic() - ticket.came
        if why := self._ended(ticket):
            yield [self._finished(ticket, why, queued=queued)]
            return
        lm, params, control = self._model.lm, self._model.params, self._control(request)
        prompt = list(request.prompt)
        drawn: list[int] = []
        depths: list[int] = []
        if request.prompt_logprobs:
            yield [self._score(prompt, request.logprobs or 0, control)]
        logits, cache, depth = _prefill(
            lm, params, self._padded(prompt), _length(prompt), lm.model.context, control
        )
        depths += np.asarray(depth)[0, : len(prompt)].tolist()
        if request.prompt_depths:
            yield [PromptRead(tuple(depths[:-1]))]
        reason = "length"
        while len(drawn) < request.max_tokens:
            self.hold.wait()
            if why := self._ended(ticket):
                reason = why
                break
            token, logprob, top = self._draw(np.asarray(logits)[0, : self._vocab], request, drawn)
            drawn.append(token)
            stopped = token in request.stop_tokens
            yield [Token(token, int(depths[-1]), logprob, top, stopped)]
            if stopped or _advanced(request, token):
                reason = "stop"
                break
            if len(drawn) < request.max_tokens:
                logits, cache, depth = _decode(lm, params, cache, jnp.asarray([token]), control)
                depths.append(int(depth[0]))
                self._counts["generation_steps_total"] += 1
        yield [self._finished(ticket, reason, drawn=len(drawn), depths=depths, queued=queued)]

    def _ended(self, ticket: PlainTicket) -> str | None:
        if self._closing == "close":
            return "error"
        late = (
            ticket.request.deadline_s is not None
            and time.monotonic() - ticket.came > ticket.request.deadline_s
        )
        return ticket.wish or ("deadline" if late else None)

    def _padded(self, prompt: list[int]) -> jax.Array:
        row = np.zeros(
            (1, min(max(16, 1 << (len(prompt) - 1).bit_length()), self._model.lm.model.context)),
            np.int32,
        )
        row[0, : len(prompt)] = prompt
        return jnp.asarray(row)

    def _score(self, prompt: list[int], top: int, control: Any) -> PromptScored:
        raw = _forward(
            self._model.lm, self._model.params, self._padded(prompt), _length(prompt), control
        )
        logits_TxV = np.asarray(raw)[0, : len(prompt), : self._vocab]
        scored = [
            _scores(row, token, top) for row, token in zip(logits_TxV, prompt[1:], strict=False)
        ]
        return PromptScored((None, *(s for s, _ in scored)), ((), *(t for _, t in scored)))

    def _draw(
        self, logits_V: np.ndarray, request: Request, drawn: list[int]
    ) -> tuple[int, float | None, tuple[tuple[int, float], ...]]:
        x = drawing_logits(logits_V, request, drawn)
        how = request.drawing
        position = len(request.prompt) + len(drawn)
        if how.temperature == 0:
            token = int(np.argmax(x))
        else:
            key = jax.random.fold_in(jax.random.key(how.seed), position)
            kept = truncated(x / how.temperature, how)
            token = int(np.argmax(kept + np.asarray(jax.random.gumbel(key, kept.shape))))
        if request.logprobs is None:
            return token, None, ()
        return token, *_scores(logits_V, token, request.logprobs)


class Lost(Exception):
    """A request's own grammar gave up: the others go on."""


def _advanced(request: Request, token: int) -> bool:
    """Whether the grammar has come to its end with this token."""
    try:
        if request.grammar is not None:
            request.grammar.advance(token)
        return request.grammar is not None and request.grammar.finished
    except Exception as e:
        raise Lost(f"the grammar cannot go on: {e}") from e


def drawing_logits(logits_V: np.ndarray, request: Request, drawn: list[int]) -> np.ndarray:
    """Logits after bias, penalties and bans, float64 [V]."""
    x, how = logits_V.astype(np.float64), request.drawing
    for token, value in how.logit_bias:
        x[token] += value
    seen = np.unique([*request.prompt, *drawn])
    x[seen] = np.where(
        x[seen] > 0, x[seen] / how.repetition_penalty, x[seen] * how.repetition_penalty
    )
    counts = np.bincount(drawn, minlength=len(x)) if drawn else np.zeros(len(x), int)
    x -= how.presence_penalty * (counts > 0) + how.frequency_penalty * counts
    if request.grammar is not None:
        try:
            words = np.asarray(request.grammar.allowed(), np.uint32)
        except Exception as e:
            raise Lost(f"the grammar cannot go on: {e}") from e
        x[
            ((words[np.arange(len(x)) // 32] >> (np.arange(len(x)) % 32).astype(np.uint32)) & 1)
            == 0
        ] = -np.inf
    elif len(drawn) < request.min_tokens:
        x[list(request.stop_tokens)] = -np.inf
    return x


def truncated(x_V: np.ndarray, how: Drawing) -> np.ndarray:
    """Logits with what top-k, top-p (among those) and min-p leave out at minus infinity."""
    order = np.argsort(-x_V, kind="stable")
    keep = np.ones(len(x_V), bool)
    if how.top_k:
        keep[order[how.top_k :]] = False
    share = np.exp(x_V - x_V.max()) * keep
    share /= share.sum()
    before = np.cumsum(share[order]) - share[order]
    keep[order[before >= how.top_p]] = False
    keep &= share >= how.min_p * share.max()
    return np.where(keep, x_V, -np.inf)


def _scores(
    logits_V: np.ndarray, token: int, top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    x = logits_V.astype(np.float64)
    below = x - np.max(x)
    logprob = below - np.log(np.exp(below).sum())
    best = np.argsort(-logprob, kind="stable")[:top]
    return float(logprob[token]), tuple((int(t), float(logprob[t])) for t in best)


def _length(prompt: list[int]) -> jax.Array:
    return jnp.asarray([len(prompt)], jnp.int32)


_prefill = jax.jit(prefill, static_argnums=(0, 4))
_decode = jax.jit(decode_step, static_argnums=0, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    lm: LM, params: Any, tokens_BxT: jax.Array, lengths_B: jax.Array, control: Any
) -> jax.Array:
    segments = (jnp.arange(tokens_BxT.shape[1]) < lengths_B[:, None]).astype(jnp.int32)
    return lm.apply(params, tokens_BxT, segments, mode=CAUSAL, control=control)
