"""The engine as it runs: one thread that carries out the scheduler's plan on the device, one tick ahead of what it reads.

A round: take what came in, dispatch what the plan says and a tick, then read what the round before dispatched, hand
out its events. The device therefore always has work while the host thinks.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor_jax.errors import UserError
from mor_jax.inference.engine import compilations
from mor_jax.inference.engine.device import Lengths
from mor_jax.inference.engine.prefix import PrefixTree
from mor_jax.inference.engine.request import (
    DepthWish,
    Event,
    Finished,
    OnEvents,
    PromptRead,
    QueueFull,
    Request,
    Token,
)
from mor_jax.inference.engine.rows import host_row
from mor_jax.inference.engine.scheduler import DECODE, OVER, Admit, End, Job, Preempt, Prefill, Scheduler, Start
from mor_jax.inference.engine.stats import Counts

REASONS = ("stop", "length", "cancelled", "deadline", "error")


@dataclass(frozen=True)
class ServiceConfig:
    """queue: requests that may wait for a lane; more are refused with `QueueFull`.
    round_tokens: prompt tokens prefilled between two ticks, about; fewer make running requests smoother, new ones later.
    prefix_bytes: of the prefix cache, on the device, beside the lanes; None: as much as the lanes take; 0: none.
    hold_tokens: prompt tokens that somebody else is computing are worth waiting for from so many on.
    idle_s: the thread ends after so many seconds without work; the next request starts another.
    """

    queue: int = 256
    round_tokens: int = 256
    prefix_bytes: int | None = None
    hold_tokens: int = 32
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
      device: a `device.Device` (or anything with its methods). Nobody else may use it until `close`.
      control_of: the depth control of a wish; raises UserError.
      scorer: a `scoring.Scorer`; without one, log-probabilities of prompts are refused.
      eos: the token after which a constrained text is over.
      clock: seconds.
    """

    def __init__(
        self, device: Any, config: ServiceConfig | None = None, *, control_of: Callable[[DepthWish], Any] | None = None,
        scorer: Any = None, eos: int | None = None, clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.device, self.config = device, config or ServiceConfig()
        self.context = device.context
        self._control_of, self._scorer, self._eos, self._clock = control_of or (lambda wish: None), scorer, eos, clock
        self._rooms = [device.capacity(lane).entries for lane in range(device.lanes)]
        kept = self.config.prefix_bytes
        self._tree = PrefixTree(device.memory_bytes if kept is None else kept)
        self._scheduler = Scheduler(
            self._rooms, self._tree, most=-(-max(self._rooms) // device.context), expected=device.expected_entries,
            cut=device.cut, round_tokens=self.config.round_tokens, hold_tokens=self.config.hold_tokens,
        )  # fmt: skip
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._thread: threading.Thread | None = None
        self._warm = False
        self._arrivals = self._open = 0
        self._closing: str | None = None
        self._failure: str | None = None
        self._old: deque[tuple[Any, Any]] = deque()  # (ticket, who it is of), of the round before
        self._new: deque[tuple[Any, Any]] = deque()  # of this round
        self._over: list[Job] = []  # ended in this round, their last events not handed out yet
        self._vocab = device.draw_config.vocab_size
        self.counts = Counts()

    # ------------------------------------------------------------------------------------- any thread

    @property
    def healthy(self) -> bool:
        """False once the engine's thread has failed; it does not come back."""
        return self._failure is None

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile everything now; else the first request does."""
        if not self._warm:
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
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return EngineTicket(self, job)

    def stats(self) -> dict[str, float]:
        """See `request.Service`. Seconds, bytes, tokens and counts; `_perc` are shares from 0 to 1."""
        running = dict(self._scheduler.running)
        device, tree = self.device, self._tree
        used = sum(device.bytes_per_sequence(*device.lengths(lane)) for lane in running)
        return {
            "num_requests_running": float(len(running)),
            "num_requests_waiting": float(len(self._inbox) + len(self._scheduler.waiting)),
            "lane_occupancy": len(running) / device.lanes,
            "kv_cache_usage_perc": used / device.memory_bytes,
            "prefix_cache_usage_perc": (tree.total - tree.available) / tree.total if tree.total else 0.0,
            "prefix_cache_bytes": float(tree.total - tree.available),
            "num_preemptions_total": float(self._scheduler.preemptions),
            "held_back_total": float(self._scheduler.held_back),
            "compilations_total": float(self.counts.compiled),
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
            raise UserError("a prompt has no tokens; give at least one (the document start will do).")
        if r.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {r.max_tokens}.")
        if len(r.prompt) + r.max_tokens > self.context:
            raise UserError(
                f"the prompt has {len(r.prompt)} tokens and {r.max_tokens} new ones are asked for, together "
                f"{len(r.prompt) + r.max_tokens}; a sequence may have {self.context}. Shorten the prompt or ask for fewer."
            )
        if min(r.prompt) < 0 or max(r.prompt) >= self._vocab:
            wrong = next(t for t in r.prompt if not 0 <= t < self._vocab)
            raise UserError(f"the prompt holds the token id {wrong}; ids go from 0 to {self._vocab - 1}.")
        if r.prompt_logprobs and (self._scorer is None or r.logprobs is None):
            why = "logprobs is not set" if r.logprobs is None else "this engine was built without a scorer"
            raise UserError(f"log-probabilities of the prompt were asked for, but {why}.")
        # Made again when the request starts: a row of a large vocabulary is too much to keep for all that wait.
        host_row(
            r.drawing, self.device.draw_config, prompt=(), stop_tokens=r.stop_tokens, min_tokens=r.min_tokens,
            logprobs=r.logprobs,
        )  # fmt: skip

    def _mean(self, wish: DepthWish) -> float | None:
        """Mean depth to expect under a wish; None: the model's own."""
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

    # ------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self.warm_up()
            self.counts.watch(compilations.here())
            while self._round():
                pass
        except BaseException as e:
            self._fail(f"{type(e).__name__}: {e}")

    def _round(self) -> bool:
        """False: nothing to do any more, and the thread is to end."""
        with self._changed:
            busy = lambda: self._inbox or self._scheduler.running or self._scheduler.waiting or self._old
            if not busy() and self._closing != "close":
                self._changed.wait_for(lambda: busy() or self._closing == "close", self.config.idle_s)
            if self._closing != "close" and not busy():
                self._thread = None
                return False
            left = self._take_all() if self._closing == "close" else None
            for job in self._inbox:
                self._scheduler.add(job)
            self._inbox.clear()
        if left is not None:
            self._end_all(left, "the engine was closed")
            return False
        self._score_a_little()
        for action in self._scheduler.plan(self._clock()):
            self._carry_out(action)
        if any(job.phase == DECODE for job in self._scheduler.running.values()):
            lanes = {lane: (job, job.stint) for lane, job in self._scheduler.running.items() if job.phase == DECODE}
            self._new.append((self.device.tick(), lanes))
        elif not self._new and not self._old and self._scheduler.jobs() and not self._scoring():
            raise RuntimeError("the scheduler has requests and nothing to do")
        while self._old:
            self._read(*self._old.popleft())
        self._old, self._new = self._new, self._old
        self._hand_out()
        self.counts.compiled = compilations.here() - self.counts.compiled_before
        return True

    def _scoring(self) -> list[Job]:
        return [job for job in self._scheduler.waiting if job.unready]

    def _score_a_little(self) -> None:
        """One chunk of one prompt whose tokens' log-probabilities are wanted."""
        for job in self._scoring()[:1]:
            scored = next(job.scoring)
            if scored is not None:
                job.events.append(scored)
                job.unready, job.scoring = False, None

    def _carry_out(self, action: Any) -> None:
        device, job = self.device, action.job
        if isinstance(action, End):
            self._ended(action)
        elif isinstance(action, Preempt):
            device.stop(action.lane)
            if not job.generated:
                job.depth_sum = job.depth_count = 0
            if not job.told_depths:
                job.prompt_depths.clear()
        elif isinstance(action, Admit):
            device.open(job.lane, job.control)
            for node in action.path:
                device.load(job.lane, node.rows)
                job.prompt_depths += node.depths
            if not job.preempted:
                self.counts.admitted(len(job.request.prompt) - 1, job.cached, job.began - job.came)
        elif isinstance(action, Prefill):
            self._new.append((device.prefill(job.lane, action.chunk), (job, job.stint, action)))
            self.counts.prefilled(len(action.chunk))
        elif isinstance(action, Start):
            self._start(job)

    def _start(self, job: Job) -> None:
        r = job.request
        try:
            row = host_row(
                r.drawing, self.device.draw_config, prompt=r.prompt, generated=job.generated,
                stop_tokens=r.stop_tokens, min_tokens=r.min_tokens, logprobs=r.logprobs, grammar=r.grammar,
            )  # fmt: skip
        except Exception as e:  # a grammar that cannot go on
            self._lose(job, e)
            return
        token = job.generated[-1] if job.generated else r.prompt[-1]
        self.device.start(job.lane, token, row, r.max_tokens - len(job.generated))

    # ------------------------------------------------------------------------------------- what came back

    def _read(self, ticket: Any, whose: Any) -> None:
        got = ticket.fetch()
        if not isinstance(whose, dict):
            self._prefilled(got, *whose)
            return
        for ticked in got:
            self.counts.ticked(ticked)
            for lane, (job, stint) in whose.items():
                if job.phase == DECODE and job.stint == stint:
                    self._drew(job, lane, ticked)

    def _prefilled(self, got: Any, job: Job, stint: int, action: Prefill) -> None:
        if job.stint != stint or job.lane < 0:
            return
        if not got.fits:
            self._scheduler.outgrew(job)
            return
        if action.node is not None and not action.node.gone:
            start = action.node.parent.rows.stop if action.node.parent.rows is not None else Lengths(0, 0)
            self._tree.fill(action.node, self.device.save(job.lane, start, got.lengths), got.depth_T)
        if not job.generated:
            job.depth_sum += int(np.sum(got.depth_T))
            job.depth_count += len(got.depth_T)
            if not job.told_depths:
                job.prompt_depths += np.asarray(got.depth_T).tolist()
        self._scheduler.prefilled(job, len(action.chunk), got.lengths.entries)

    def _drew(self, job: Job, lane: int, t: Any) -> None:
        if t.starved_N[lane]:
            self._scheduler.outgrew(job)
        token = int(t.token_N[lane])
        if token < 0:
            return
        if job.request.prompt_depths and not job.told_depths:
            job.events.append(PromptRead(tuple(job.prompt_depths)))
            job.told_depths = True
        r, depth, stopped = job.request, int(t.depth_N[lane]), bool(t.stopped_N[lane])
        logprob, top = None, ()
        if r.logprobs is not None:
            logprob = float(t.logprob_N[lane])
            best = zip(t.top_ids_NxK[lane], t.top_logprobs_NxK[lane], strict=True)
            top = tuple((int(i), float(x)) for i, x in list(best)[: r.logprobs])
        job.generated.append(token)
        job.depth_sum += depth
        job.depth_count += 1
        self.counts.drew(depth, self._clock() - job.came if len(job.generated) == 1 else None)
        ended = bool(t.ended_N[lane])
        if r.grammar is not None:
            try:
                r.grammar.advance(token)
                over = r.grammar.finished
                stopped = stopped or (over and token == self._eos)
                if not over and not ended:
                    mask = r.grammar.allowed()
                    self.device.put_mask(lane, mask, len(r.prompt) + len(job.generated))
            except Exception as e:
                job.events.append(Token(token, depth, logprob, top, stopped))
                self._lose(job, e)
                return
            ended, stopped_by_grammar = ended or over, over
        else:
            stopped_by_grammar = False
        job.events.append(Token(token, depth, logprob, top, stopped))
        if ended:
            self._ended(self._scheduler.remove(job, "stop" if stopped or stopped_by_grammar else "length"))

    def _lose(self, job: Job, error: BaseException) -> None:
        """One request cannot go on, through its own fault."""
        self._ended(self._scheduler.remove(job, "error"), f"{type(error).__name__}: {error}")

    def _ended(self, end: End, error: str | None = None) -> None:
        job = end.job
        if end.lane >= 0:
            self.device.stop(end.lane)
        job.events.append(self._finished(job, end.reason, error))
        self._over.append(job)

    def _finished(self, job: Job, reason: str, error: str | None = None) -> Finished:
        now = self._clock()
        self.counts.finished(reason, now - job.came)
        mean = job.depth_sum / job.depth_count if job.depth_count else math.nan
        waited = (now if job.began is None else job.began) - job.came
        return Finished(
            reason, len(job.request.prompt), job.cached, len(job.generated), mean, waited, job.preempted, error
        )  # fmt: skip

    def _hand_out(self) -> None:
        over, self._over = self._over, []
        for job in [*self._scheduler.jobs(), *over]:
            if job.events:
                events, job.events = job.events, []
                self._tell(job, events)
        self._count_out(len(over))

    def _tell(self, job: Job, events: Sequence[Event]) -> None:
        try:
            job.on_events(list(events))
        except Exception:  # whoever asked cannot listen any more: nothing is left to be told
            self.counts.deaf += 1
            if job.phase != OVER:
                job.wish = job.wish or "cancelled"

    def _count_out(self, jobs: int) -> None:
        if jobs:
            with self._changed:
                self._open -= jobs
                self._changed.notify_all()

    # ------------------------------------------------------------------------------------- the end of it

    def _take_all(self) -> list[Job]:
        left = [*self._scheduler.jobs(), *self._inbox]
        self._inbox.clear()
        return left

    def _fail(self, message: str) -> None:
        with self._changed:
            self._failure, self._thread = message, None
            left = self._take_all()
        over, self._over = self._over, []
        for job in over:  # ended in the round that failed
            self._tell(job, job.events)
        self._end_all([job for job in left if job.phase != OVER], message, also=len(over), clean=False)

    def _end_all(self, jobs: list[Job], message: str, *, also: int = 0, clean: bool = True) -> None:
        """`clean`: the device works and its lanes are to be free."""
        for job in jobs:
            end = self._scheduler.remove(job, "error") if job in self._scheduler.jobs() else End(job, "error", -1)
            job.phase = OVER
            if clean and end.lane >= 0:
                self.device.stop(end.lane)
            self._tell(job, [*job.events, self._finished(job, "error", message)])
        self._old.clear()
        self._new.clear()
        self._count_out(len(jobs) + also)
