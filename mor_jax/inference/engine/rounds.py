"""Rounds of the engine: dispatch what the scheduler plans, then read what the round before
dispatched.

A round dispatches its prefills and one tick before it reads the results of the round before, so the
device has work while the host plans. This module uses no threads; `service.py` calls `step` in one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mor_jax.inference.engine.device import Lengths
from mor_jax.inference.engine.request import Event, Finished, PromptRead, Token
from mor_jax.inference.engine.rows import host_row
from mor_jax.inference.engine.scheduler import (
    DECODE,
    OVER,
    Admit,
    End,
    Job,
    Preempt,
    Prefill,
    Scheduler,
    Start,
)
from mor_jax.inference.engine.stats import Counts


class Rounds:
    """Args:
    device: a `device.Device`, or anything with its methods.
    scheduler: of the device's lanes.
    eos: the token after which a constrained text is over.
    clock: seconds.
    """

    def __init__(
        self, device: Any, scheduler: Scheduler, *, eos: int | None, clock: Callable[[], float]
    ):
        self._device, self._scheduler, self._eos, self._clock = device, scheduler, eos, clock
        self._old: deque[tuple[Any, Any]] = deque()  # (ticket, its jobs) of the round before
        self._new: deque[tuple[Any, Any]] = deque()  # of this round
        self._open: dict[int, Job] = {}  # jobs that have not been told their last event
        self._over: list[Job] = []  # those of them that ended in this round
        self._scored: Job | None = None  # the job with the prompt that is being scored
        self.counts = Counts()

    @property
    def busy(self) -> bool:
        """Whether work is waiting or under way."""
        return bool(self._old or self._scheduler.running or self._scheduler.waiting)

    def step(self) -> int:
        """Runs one round. Returns the number of requests that ended in it."""
        self._score_a_little()
        for action in self._scheduler.plan(self._clock()):
            self._carry_out(action)
        jobs_by_lane = {
            lane: (job, job.admissions)
            for lane, job in self._scheduler.running.items()
            if job.phase == DECODE
        }
        if jobs_by_lane:
            self._new.append((self._device.tick(), jobs_by_lane))
        elif not self._new and not self._old and self._scheduler.jobs() and not self._scoring():
            raise RuntimeError("the scheduler has requests and nothing to do")
        while self._old:
            self._read(*self._old.popleft())
        self._old, self._new = self._new, self._old
        return self._hand_out()

    def add(self, job: Job) -> None:
        """Adds a new request that the scheduler has prepared."""
        self._open[id(job)] = job
        self._scheduler.add(job)

    def end_all(self, jobs: Sequence[Job], message: str, *, works: bool) -> int:
        """Ends these jobs and all that were added, also after a round that failed. Returns their
        number.

        `works`: the device still works, so its lanes are freed."""
        left = [*self._open.values(), *jobs]
        known = set(map(id, self._scheduler.jobs()))
        for job in left:
            end = (
                self._scheduler.remove(job, "error") if id(job) in known else End(job, "error", -1)
            )
            job.phase = OVER
            if works and end.lane >= 0:
                self._device.stop(end.lane)
            over = bool(job.events) and isinstance(job.events[-1], Finished)
            self._tell(
                job, job.events if over else [*job.events, self._finished(job, "error", message)]
            )
        self._open.clear()
        self._over.clear()
        for ticket, _ in self._old if works else ():
            ticket.fetch()  # wait, so that the device is idle afterwards
        self._old.clear()
        self._new.clear()
        return len(left)

    def _scoring(self) -> list[Job]:
        return [job for job in self._scheduler.waiting if job.unready]

    def _score_a_little(self) -> None:
        """Scores one chunk of one prompt. The scorer has one lane, so prompts are scored one after
        another."""
        if self._scored is None or self._scored.phase == OVER:
            self._scored = next(iter(self._scoring()), None)
        if (job := self._scored) is not None and (scored := next(job.scoring)) is not None:
            job.events.append(scored)
            job.unready, job.scoring, self._scored = False, None, None

    def _carry_out(self, action: Any) -> None:
        device, job = self._device, action.job
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
            self._new.append(
                (device.prefill(job.lane, action.chunk), (job, job.admissions, action))
            )
            self.counts.prefilled(len(action.chunk))
        elif isinstance(action, Start):
            self._start(job)

    def _start(self, job: Job) -> None:
        r = job.request
        try:
            row = host_row(
                r.drawing,
                self._device.draw_config,
                prompt=r.prompt,
                generated=job.generated,
                stop_tokens=r.stop_tokens,
                min_tokens=r.min_tokens,
                logprobs=r.logprobs,
                grammar=r.grammar,
            )
        except Exception as e:  # a grammar that cannot go on
            self._lose(job, e)
            return
        token = job.generated[-1] if job.generated else r.prompt[-1]
        self._device.start(job.lane, token, row, r.max_tokens - len(job.generated))

    # ------------------------------------------------------------------------------------- what
    # came back

    def _read(self, ticket: Any, of: Any) -> None:
        """Reads a ticket. `of`: (job, admission, action) of a prefill, or {lane: (job, admission)}
        of a tick."""
        got = ticket.fetch()
        if not isinstance(of, dict):
            self._prefilled(got, *of)
            return
        jobs_by_lane = of
        for ticked in got:
            self.counts.ticked(ticked)
            for lane, (job, admission) in jobs_by_lane.items():
                if job.phase == DECODE and job.admissions == admission:
                    self._drew(job, lane, ticked)

    def _prefilled(self, got: Any, job: Job, admission: int, action: Prefill) -> None:
        if job.admissions != admission or job.lane < 0:
            return
        if not got.fits:
            self._scheduler.outgrew(job)
            return
        if action.node is not None and not action.node.gone:
            parent = action.node.parent
            before = None if parent is None else parent.rows
            start = Lengths(0, 0) if before is None else before.stop
            self._scheduler.tree.fill(
                action.node, self._device.save(job.lane, start, got.lengths), got.depth_T
            )
        if not job.generated:
            job.depth_sum += int(np.sum(got.depth_T))
            job.depth_count += len(got.depth_T)
            if not job.told_depths:
                job.prompt_depths += np.asarray(got.depth_T).tolist()
        self._scheduler.prefilled(job, len(action.chunk), got.lengths.entries)

    def _drew(self, job: Job, lane: int, t: Any) -> None:
        if t.starved_N[lane] and not self._scheduler.outgrew(job):
            self._lose(job, RuntimeError("the lane with the most room has none left"))
            return
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
                    self._device.put_mask(lane, mask, len(r.prompt) + len(job.generated))
            except Exception as e:
                job.events.append(Token(token, depth, logprob, top, stopped))
                self._lose(job, e)
                return
            ended, stopped_by_grammar = ended or over, over
        else:
            stopped_by_grammar = False
        job.events.append(Token(token, depth, logprob, top, stopped))
        if ended:
            self._ended(
                self._scheduler.remove(job, "stop" if stopped or stopped_by_grammar else "length")
            )

    def _lose(self, job: Job, error: BaseException) -> None:
        """Ends one request with an error of its own; the others go on."""
        self._ended(self._scheduler.remove(job, "error"), f"{type(error).__name__}: {error}")

    def _ended(self, end: End, error: str | None = None) -> None:
        job = end.job
        job.events.append(self._finished(job, end.reason, error))
        self._over.append(job)
        if end.lane >= 0:
            self._device.stop(end.lane)

    def _finished(self, job: Job, reason: str, error: str | None = None) -> Finished:
        now = self._clock()
        self.counts.finished(reason, now - job.came)
        mean = job.depth_sum / job.depth_count if job.depth_count else math.nan
        waited = (now if job.began is None else job.began) - job.came
        return Finished(
            reason,
            len(job.request.prompt),
            job.cached,
            len(job.generated),
            mean,
            waited,
            job.preempted,
            error,
        )

    def _hand_out(self) -> int:
        over, self._over = self._over, []
        for job in [*self._scheduler.jobs(), *over]:
            if job.events:
                events, job.events = job.events, []
                self._tell(job, events)
        for job in over:
            del self._open[id(job)]
        return len(over)

    def _tell(self, job: Job, events: Sequence[Event]) -> None:
        try:
            job.on_events(list(events))
        except Exception:  # the listener failed, so no more events are sent to it
            self.counts.lost_listeners += 1
            if job.phase != OVER:
                job.wish = job.wish or "cancelled"
