"""The public interface of the engine. Any thread submits requests; one thread runs the rounds
(`rounds.py`)."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mor_jax.errors import UserError
from mor_jax.inference.engine.prefix import PrefixTree
from mor_jax.inference.engine.request import DepthWish, OnEvents, QueueFull, Request
from mor_jax.inference.engine.rounds import Rounds
from mor_jax.inference.engine.rows import host_row
from mor_jax.inference.engine.scheduler import Job, Scheduler
from mor_jax.inference.engine.stats import compiled_here


@dataclass(frozen=True)
class ServiceConfig:
    """queue: requests that may wait for a lane; more are refused with `QueueFull`.
    round_tokens: prompt tokens prefilled between two ticks, about; fewer make running requests
    smoother, new ones later.
    prefix_bytes: of the prefix cache, on the device, beside the lanes; None: as much as the lanes
    take; 0: none.
    hold_tokens: a request waits for another that computes the same prompt tokens, from this number
    of tokens on.
    keep_tokens: chunks of fewer tokens are not cached: computing them again is as cheap as copying
    them.
    idle_s: the thread ends after so many seconds without work; the next request starts another.
    """

    queue: int = 256
    round_tokens: int = 256
    prefix_bytes: int | None = None
    hold_tokens: int = 32
    keep_tokens: int = 32
    idle_s: float = 2.0


class EngineTicket:
    """See `request.Ticket`."""

    def __init__(self, service: EngineService, job: Job):
        self._service, self._job = service, job

    def cancel(self) -> None:
        self._service._wish(self._job, "cancelled")

    def finish(self) -> None:
        self._service._wish(self._job, "stop")


class EngineService:
    """See `request.Service`; `build.build_service` makes one from a loaded model.

    Args:
      device: a `device.Device` (or anything with its methods). Nobody else may use it until
        `close`.
      control_of: the depth control of a wish; raises UserError.
      scorer: a `scoring.Scorer`; without one, log-probabilities of prompts are refused.
      eos: the token after which a constrained text is over.
      clock: seconds.
    """

    def __init__(
        self,
        device: Any,
        config: ServiceConfig | None = None,
        *,
        control_of: Callable[[DepthWish], Any] | None = None,
        scorer: Any = None,
        eos: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.device, self.config = device, config or ServiceConfig()
        self.context = device.context
        self._control_of, self._scorer, self._clock = (
            control_of or (lambda wish: None),
            scorer,
            clock,
        )
        self._rooms = [device.capacity(lane).entries for lane in range(device.lanes)]
        kept = self.config.prefix_bytes
        self._tree = PrefixTree(device.memory_bytes if kept is None else kept)
        self._scheduler = Scheduler(
            self._rooms,
            self._tree,
            most=-(-max(self._rooms) // device.context),
            expected=device.expected_entries,
            cut=device.cut,
            round_tokens=self.config.round_tokens,
            hold_tokens=self.config.hold_tokens,
            keep_tokens=self.config.keep_tokens,
        )
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._thread: threading.Thread | None = None
        self._warm = False
        self._arrivals = self._open = 0
        self._closing: str | None = None
        self._failure: str | None = None
        self._vocab = device.draw_config.vocab_size
        self._rounds = Rounds(device, self._scheduler, eos=eos, clock=clock)
        self.counts = self._rounds.counts

    # ------------------------------------------------------------------------------------- any
    # thread

    @property
    def healthy(self) -> bool:
        """False once the engine's thread has failed; it does not come back."""
        return self._failure is None

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compiles all programs now. Otherwise the first request compiles them."""
        if not self._warm:
            if not self.device.warm:
                self.device.warm_up(progress)
            if self._scorer is not None:
                self._scorer.warm_up()
            self._warm = True

    def submit(self, request: Request, on_events: OnEvents) -> EngineTicket:
        """See `request.Service`."""
        self._check(request)
        control = self._control_of(request.depth)
        job = Job(0, request, on_events, self._clock(), control, self._mean(request.depth))
        if request.prompt_logprobs:
            job.scoring, job.unready = self._scorer.steps(request.prompt, control), True
        self._scheduler.prepare(job)
        with self._changed:
            self._refuse_if_over()
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting >= self.config.queue:
                raise QueueFull(
                    f"{waiting} requests wait already, and the queue holds {self.config.queue}; try again later.",
                    self.counts.wait_for(waiting, self.device.lanes),
                )
            job.number = self._arrivals
            self._arrivals += 1
            self._open += 1
            self._inbox.append(job)
            self._begin()
            self._changed.notify_all()
        return EngineTicket(self, job)

    def stats(self) -> dict[str, float]:
        """See `request.Service`. Seconds, bytes, tokens and counts; `_perc` are shares from 0 to
        1."""
        running = dict(self._scheduler.running)
        device, tree = self.device, self._tree
        used = sum(device.bytes_per_sequence(*device.lengths(lane)) for lane in running)
        return {
            "num_requests_running": float(len(running)),
            "num_requests_waiting": float(len(self._inbox) + len(self._scheduler.waiting)),
            "lane_occupancy": len(running) / device.lanes,
            "kv_cache_usage_perc": used / device.memory_bytes,
            "prefix_cache_usage_perc": (tree.total - tree.available) / tree.total
            if tree.total
            else 0.0,
            "prefix_cache_bytes": float(tree.total - tree.available),
            "num_preemptions_total": float(self._scheduler.preemptions),
            "held_back_total": float(self._scheduler.held_back),
            "compilations_total": float(self.counts.compiled),
            "spec_decode_num_draft_tokens_total": float(getattr(device, "drafted", 0)),
            "spec_decode_num_accepted_tokens_total": float(getattr(device, "accepted", 0)),
            **self.counts.to_dict(),
        }

    def drain(self, timeout_s: float | None = None) -> bool:
        """See `request.Service`."""
        with self._changed:
            self._closing = self._closing or "drain"
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._open == 0, timeout_s)

    def close(self) -> None:
        """See `request.Service`. Waits for the thread."""
        with self._changed:
            self._closing, thread = "close", self._thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _refuse_if_over(self) -> None:
        if self._failure is not None:
            raise UserError(f"the engine has failed ({self._failure}); start it again.")
        if self._closing is not None:
            raise UserError("the engine is closing and accepts nothing more; start another.")

    def _check(self, r: Request) -> None:
        if not r.prompt:
            raise UserError(
                "a prompt has no tokens; give at least one (the document start will do)."
            )
        if r.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {r.max_tokens}.")
        if len(r.prompt) + r.max_tokens > self.context:
            raise UserError(
                f"the prompt has {len(r.prompt)} tokens and {r.max_tokens} new ones are asked for, together "
                f"{len(r.prompt) + r.max_tokens}; a sequence may have {self.context}. Shorten the prompt or ask for fewer."
            )
        if min(r.prompt) < 0 or max(r.prompt) >= self._vocab:
            wrong = next(t for t in r.prompt if not 0 <= t < self._vocab)
            raise UserError(
                f"the prompt holds the token id {wrong}; ids go from 0 to {self._vocab - 1}."
            )
        if r.prompt_logprobs and (self._scorer is None or r.logprobs is None):
            why = (
                "logprobs is not set"
                if r.logprobs is None
                else "this engine was built without a scorer"
            )
            raise UserError(f"log-probabilities of the prompt were asked for, but {why}.")
        # Made again when the request starts: a row of a large vocabulary is too much to keep for
        # all that wait.
        host_row(
            r.drawing,
            self.device.draw_config,
            prompt=(),
            stop_tokens=r.stop_tokens,
            min_tokens=r.min_tokens,
            logprobs=r.logprobs,
        )

    def _mean(self, wish: DepthWish) -> float | None:
        """The expected mean depth of a request with this wish; None: the model's own mean depth."""
        if wish.mean is None and wish.least is None and wish.most is None:
            return None
        mean = wish.mean
        if mean is None:
            mean = self.device.expected_entries(self.context) / self.context
        low, high = wish.least or 0, math.inf if wish.most is None else wish.most
        return min(max(mean, low), high)

    def _wish(self, job: Job, reason: str) -> None:
        with self._changed:
            job.wish = job.wish or reason
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------- the
    # thread

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self.warm_up()
            self.counts.watch(compiled_here())
            while self._round():
                pass
        except BaseException as e:
            with self._changed:
                self._failure, self._thread = f"{type(e).__name__}: {e}", None
                left, self._inbox = self._inbox, []
            self._count_out(self._rounds.end_all(left, self._failure, works=False))

    def _round(self) -> bool:
        """Waits for work and runs one round. Returns False when the thread should end."""
        with self._changed:

            def wanted() -> bool:
                return bool(self._inbox or self._rounds.busy or self._closing == "close")

            if not self._changed.wait_for(wanted, self.config.idle_s):
                self._thread = None
                return False
            come, self._inbox = self._inbox, []
            if closing := self._closing == "close":
                self._thread = None
            else:
                for job in come:
                    self._rounds.add(job)
        if closing:
            self._count_out(self._rounds.end_all(come, "the engine was closed", works=True))
            return False
        self._count_out(self._rounds.step())
        self.counts.compiled = compiled_here() - self.counts.compiled_before
        return True

    def _count_out(self, jobs: int) -> None:
        if jobs:
            with self._changed:
                self._open -= jobs
                self._changed.notify_all()
