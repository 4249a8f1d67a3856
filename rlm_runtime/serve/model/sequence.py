"""One sequence of a request: decodes tokens to text, cuts at stop strings, and assigns
log-probabilities to text.

Everything here runs on the event loop; the engine's thread only drops events into the `Mailbox`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from rlm_runtime.lms.stops import StopCutter
from rlm_runtime.serve.model.backend import ModelBackend, Ticket


class Mailbox:
    """Events of all sequences on their way from the engines' threads to the loop: one wake-up for
    each batch of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._lock = loop, threading.Lock()
        self._letters: list[tuple[Callable[[list[Any]], None], list[Any]]] = []
        self.wakes = 0

    def put(self, take: Callable[[list[Any]], None], events: list[Any]) -> None:
        """Called in an engine's thread; never blocks for long."""
        with self._lock:
            self._letters.append((take, events))
            if len(self._letters) > 1:
                return  # the loop has been woken for the ones before
        try:
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # the loop is closed, so nothing waits for these events
            with self._lock:
                self._letters.clear()

    def _deliver(self) -> None:
        with self._lock:
            letters, self._letters = self._letters, []
        self.wakes += 1
        for take, events in letters:
            take(events)


class Scored(NamedTuple):
    """A token with its log-probability, and where its text begins in the reply."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    start: int
    end: int


class Sequence:
    """Text and tokens of one sequence so far. `changed` is called after each batch of events."""

    def __init__(
        self,
        model: ModelBackend,
        *,
        prompt: list[int],
        stops: tuple[str, ...],
        strip: bool,
        echo: bool,
        logprobs: bool,
        drop: bool,
        changed: Callable[[], None],
    ):
        self.finish: Any = None  # the engine's last event
        self.ticket: Ticket | None = None
        self.depths: list[int] = []
        self.sum_logprob = 0.0
        self.first_at: float | None = None  # time.monotonic() of the first token
        self.last_at = 0.0
        self.drawn = 0
        self._model, self._changed = model, changed
        self._decoder, self._cutter = model.tokenizer.stream(), StopCutter(stops)
        self._strip, self._drop, self._want = strip, drop, logprobs
        self._pieces: deque[str] = deque()  # safe to show, not shown yet
        self._scores: deque[Scored] = deque()
        self._length = self._safe = 0  # characters decoded; of them past the stop strings
        self._prompt = prompt
        if echo:
            self._show_prompt()

    @property
    def ended(self) -> str:
        """Why it ended: "stop", "length", "deadline", "cancelled" or "error"."""
        return "stop" if self._cutter.hit else self.finish.reason

    def take(self, events: list[Any]) -> None:
        """Events of the engine, in order."""
        types = self._model.engine_types
        for event in events:
            if isinstance(event, types.Finished):
                self._end(event)
            elif isinstance(event, types.PromptScored):
                self._score_prompt(event)
            elif not self._cutter.hit:  # tokens after a stop string are dropped
                self._token(event)
        self._changed()

    def cancel(self) -> None:
        if self.ticket is not None and self.finish is None:
            self.ticket.cancel()

    def pull(self) -> tuple[str, list[Scored]]:
        """The text that is new and safe to show, and the tokens that begin in it."""
        text = "".join(self._pieces)
        self._pieces.clear()
        scores = []
        over = self.finish is not None and not self._cutter.hit
        while self._scores and (over or self._scores[0].start < self._safe):
            scores.append(self._scores.popleft())
        return text, scores

    # ---- events

    def _token(self, token: Any) -> None:
        now = time.monotonic()
        self.first_at = self.first_at or now
        self.last_at = now
        self.drawn += 1
        self.depths.append(int(token.depth))
        self.sum_logprob += token.logprob or 0.0
        if self._drop or token.stopped:
            return
        piece = self._decoder.push(token.id)
        if self._strip and not self._length and piece:
            piece = piece.lstrip()
        self._add(token.id, token.logprob, token.top, piece)
        self._show(self._cutter.push(piece))
        if self._cutter.hit and self.ticket is not None:
            self.ticket.finish()

    def _end(self, event: Any) -> None:
        self.finish = event
        if not self._cutter.hit:
            tail = self._decoder.flush()
            self._length += len(tail)
            self._show(self._cutter.push(tail))
            self._show(self._cutter.flush())

    def _add(self, token: int, logprob: float | None, top: Any, piece: str) -> None:
        start = self._length
        self._length += len(piece)
        if self._want:
            self._scores.append(Scored(token, logprob, tuple(top), start, self._length))

    def _show(self, text: str) -> None:
        if text:
            self._safe += len(text)
            self._pieces.append(text)

    # ---- echo

    def _show_prompt(self) -> None:
        """The prompt's text opens the reply; its scores are there later, from the engine."""
        decoder = self._model.tokenizer.stream()
        text = "".join([*(decoder.push(t) for t in self._prompt), decoder.flush()])
        self._length = len(text)
        self._show(text)

    def _score_prompt(self, scored: Any) -> None:
        decoder, at = self._model.tokenizer.stream(), 0
        for token, logprob, top in zip(self._prompt, scored.logprobs, scored.top, strict=True):
            piece = decoder.push(token)
            self._scores.append(Scored(token, logprob, tuple(top), at, at + len(piece)))
            at += len(piece)
