"""Runs generation requests of many callers as few batches, in a thread of its own.

Requests that arrive within a few milliseconds become one batch; those that come while one runs wait for the next.
Batch sizes are powers of two (spare rows repeat a prompt) and prompt lengths are padded to powers of two by the
generator, so that only a handful of programs is ever compiled.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Job:
    """One sequence to continue. `take` and `done` are called in the batcher's thread and must not block.

    Args:
      max_tokens: with `ids` at most the model's context.
      sampling: hashable, with a `temperature`; jobs of equal sampling share a batch.
      seed: None draws one.
      take: given each token as it is drawn (the end-of-document token too); False: enough.
      done: called once, after the last `take`; with the exception if generation failed.
      wanted: False once nobody waits any more.
    """

    ids: list[int]
    max_tokens: int
    sampling: Any
    seed: int | None
    take: Callable[[int], bool]
    done: Callable[[BaseException | None], None]
    wanted: Callable[[], bool]

    @property
    def alone(self) -> bool:
        """A draw depends on the seed and on the row of the batch: a seeded one is repeatable by itself only."""
        return self.seed is not None and self.sampling.temperature > 0


Start = Callable[[list[list[int]], int, Any, int], Generator[Sequence[int], None, None]]


class Batcher:
    """`submit` from any thread. The thread starts with the first job and ends after `idle` seconds without one.

    Args:
      start: (prompts, max_tokens, sampling, seed) -> a generator of the tokens of each step, one a prompt.
      context: tokens a prompt and its continuation may have together.
      gather: seconds the first job of a batch waits for others.
    """

    def __init__(
        self, start: Start, *, context: int, max_batch: int = 32, gather: float = 0.003, idle: float = 2.0
    ):  # fmt: skip
        self.max_batch, self.batches = max_batch, 0
        self._start, self._context, self._gather, self._idle = start, context, gather, idle
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._hurry = False

    def submit(self, job: Job) -> None:
        with self._changed:
            self._jobs.append(job)
            self._hurry = False
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="rlm-batcher", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Wait for the jobs there are and end the thread, unless new ones come. A later job starts it again."""
        with self._changed:
            self._hurry, thread = True, self._thread
            self._changed.notify()
        while thread and thread.is_alive() and self._hurry:
            thread.join(0.05)

    def _serve(self) -> None:
        while True:
            with self._changed:
                wanted = lambda: self._jobs or self._hurry
                if not self._changed.wait_for(wanted, self._idle) or not self._jobs:
                    self._thread = None
                    return
                end = time.monotonic() + self._gather
                full = lambda: len(self._jobs) >= self.max_batch
                self._changed.wait_for(full, max(0.0, end - time.monotonic()))
                batch = self._next()
            self._run([job for job in batch if job.wanted()])

    def _next(self) -> list[Job]:
        """The oldest job and those that can go with it: same sampling, and each with the room it was promised."""
        first = self._jobs.popleft()
        batch, rest = [first], deque()
        longest, most = len(first.ids), first.max_tokens
        while self._jobs:
            job = self._jobs.popleft()
            room = max(longest, len(job.ids)) + max(most, job.max_tokens) <= self._context
            together = room and job.sampling == first.sampling and not (first.alone or job.alone)
            if together and len(batch) < self.max_batch:
                batch.append(job)
                longest, most = max(longest, len(job.ids)), max(most, job.max_tokens)
            else:
                rest.append(job)
        self._jobs = rest
        return batch

    def _run(self, batch: Sequence[Job]) -> None:
        open_ = dict(enumerate(batch))
        failure: BaseException | None = None
        try:
            if open_:
                self._generate(batch, open_)
        except Exception as e:
            failure = e
        for job in open_.values():  # those that took all their tokens without an end, or failed
            job.done(failure)

    def _generate(self, batch: Sequence[Job], open_: dict[int, Job]) -> None:
        prompts = [job.ids for job in batch]
        rows = 1 << (len(prompts) - 1).bit_length()
        prompts += [min(prompts, key=len)] * (rows - len(prompts))
        seed = batch[0].seed if batch[0].alone else secrets.randbits(31)
        self.batches += 1
        most = max(job.max_tokens for job in batch)
        with contextlib.closing(self._start(prompts, most, batch[0].sampling, seed)) as steps:
            for tokens in steps:
                for row, job in list(open_.items()):
                    if not job.wanted() or not job.take(int(tokens[row])):
                        del open_[row]
                        job.done(None)
                if not open_:
                    break
