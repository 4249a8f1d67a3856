"""The sequences of one request, from submission to their last event."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import Counter

from rlm_runtime.serve.http.errors import ApiError, refuse
from rlm_runtime.serve.model.metrics import ModelMetrics
from rlm_runtime.serve.model.plan import RequestPlan
from rlm_runtime.serve.model.schemas import CachedTokens, ChoiceNotes, ModelUsage, RunNotes
from rlm_runtime.serve.model.sequence import Mailbox, Sequence
from rlm_runtime.serve.model.settings import ModelSettings

TURN = 16  # sequences submitted in one go
# a cancelled sequence leaves its lane at the next tick; longer means that the engine is stuck
LEAVING_SECONDS = 30.0


class RequestRun:
    """Submits a plan's sequences and gathers what they come to. Use on one event loop."""

    def __init__(
        self, plan: RequestPlan, mailbox: Mailbox, metrics: ModelMetrics, settings: ModelSettings
    ):
        self.plan, self.changed = plan, asyncio.Event()
        self.began = time.monotonic()
        self._mailbox, self._metrics, self._settings = mailbox, metrics, settings
        self._counted = False
        self.sequences = [
            Sequence(
                plan.model,
                prompt=plan.prompts[wanted.prompt_index],
                stops=plan.stops,
                strip=plan.strip,
                echo=plan.echo,
                logprobs=plan.logprobs is not None,
                drop=plan.scoring_only,
                changed=self.changed.set,
            )
            for wanted in plan.sequences
        ]

    async def submit(self) -> None:
        """Hand everything to the engine, or nothing. Raises ApiError: 429, 400, or 503 where the
        engine is gone."""
        types, model = self.plan.model.engine_types, self.plan.model
        try:
            for number, (sequence, wanted) in enumerate(
                zip(self.sequences, self.plan.sequences, strict=True)
            ):
                if number and number % TURN == 0:
                    # a thousand prompts in one request do not hold the others up
                    await asyncio.sleep(0)
                put = functools.partial(self._mailbox.put, sequence.take)
                sequence.ticket = model.service.submit(wanted.request, put)
        except types.QueueFull as error:
            self.cancel()
            wait = str(max(1, math.ceil(error.retry_after_s)))
            text = f"The server is busy: {error} Try again in about {wait} s."
            raise ApiError(429, text, code="queue_full", headers={"Retry-After": wait}) from error
        except types.UserError as error:
            self.cancel()
            if not model.alive():
                raise ApiError(
                    503, f"The engine of {model.name} has failed.", code="engine_dead"
                ) from error
            raise refuse(str(error)) from error
        except BaseException:
            self.cancel()
            raise

    @property
    def done(self) -> bool:
        return all(s.finish is not None for s in self.sequences)

    async def wait(self) -> None:
        """Until all sequences have ended. Raises ApiError as soon as the engine has given one
        up."""
        while True:
            self.changed.clear()
            self.check()
            if self.done:
                return
            await self.changed.wait()

    def cancel(self) -> None:
        for sequence in self.sequences:
            sequence.cancel()

    async def leave(self) -> None:
        """Cancel what still runs, and wait until its lanes are free."""
        self.cancel()
        started = [s for s in self.sequences if s.ticket is not None]
        try:
            async with asyncio.timeout(LEAVING_SECONDS):
                while any(s.finish is None for s in started):
                    self.changed.clear()
                    await self.changed.wait()
        except TimeoutError:
            self._metrics.add(
                "mor_jax:stuck_sequences_total", len(started), model_name=self.plan.model.name
            )
        self.count()

    def check(self) -> None:
        """Raises ApiError if the engine gave a sequence up."""
        for sequence in self.sequences:
            if sequence.finish is not None and sequence.finish.reason == "error":
                raise ApiError(
                    500, "The engine failed while it worked on this request.", code="engine_error"
                )
            if sequence.finish is not None and sequence.ended == "cancelled":
                raise ApiError(
                    503,
                    "The request was cancelled because the server is stopping.",
                    code="cancelled",
                )

    # ---- what it came to

    def shown(self) -> list[tuple[int, Sequence]]:
        """(choice index, sequence) of what the client gets: of each prompt the best `n`, by mean
        log-probability."""
        plan, out = self.plan, []
        for start in range(0, len(self.sequences), plan.best_of):
            group = self.sequences[start : start + plan.best_of]
            if plan.best_of > plan.n:
                group = sorted(group, key=lambda s: -s.sum_logprob / max(1, s.drawn))[: plan.n]
            out += group
        return list(enumerate(out))

    def notes(self, sequence: Sequence) -> ChoiceNotes:
        return ChoiceNotes(
            ended=sequence.ended, depths=sequence.depths if self.plan.depths_wanted else None
        )

    def usage(self) -> ModelUsage:
        """Of all sequences, shown or not. A prompt counts once however many sequences continue
        it."""
        ends = [s.finish for s in self.sequences if s.finish is not None]
        heads = [s.finish for s in self.sequences[:: self.plan.best_of] if s.finish is not None]
        prompt = sum(len(p) for p in self.plan.prompts)
        completion = 0 if self.plan.scoring_only else sum(e.completion_tokens for e in ends)
        ran = [
            (e.mean_depth, e.prompt_tokens - e.cached_tokens + e.completion_tokens) for e in ends
        ]
        ran = [(depth, tokens) for depth, tokens in ran if math.isfinite(depth) and tokens > 0]
        total = sum(tokens for _, tokens in ran)
        return ModelUsage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(e.cached_tokens for e in heads)),
            mor=RunNotes(
                mean_depth=round(sum(d * t for d, t in ran) / total, 4) if total else None,
                queued_seconds=round(max((e.queued_s for e in ends), default=0.0), 6),
                preempted=sum(e.preempted for e in ends),
                ignored=list(self.plan.ignored),
            ),
        )

    def count(self) -> None:
        """Adds this run to the metrics, once."""
        if not self._counted:
            self._counted = True
            for sequence in self.sequences:
                if sequence.finish is not None:
                    self._count(sequence)

    def _count(self, sequence: Sequence) -> None:
        name, end, metrics = self.plan.model.name, sequence.finish, self._metrics
        now = time.monotonic()
        metrics.add("vllm:prompt_tokens_total", end.prompt_tokens, model_name=name)
        metrics.add("vllm:generation_tokens_total", end.completion_tokens, model_name=name)
        metrics.observe("vllm:request_queue_time_seconds", end.queued_s, model_name=name)
        metrics.observe("vllm:e2e_request_latency_seconds", now - self.began, model_name=name)
        for depth, tokens in Counter(sequence.depths).items():
            metrics.observe("mor_jax:recursion_depth", depth, tokens, model_name=name)
        good = sequence.ended in ("stop", "length")
        ended = {"cancelled": "abort"}.get(sequence.ended, sequence.ended)
        metrics.add(
            "vllm:request_success_total" if good else "mor_jax:request_failure_total",
            model_name=name,
            finished_reason=ended,
        )
        if sequence.first_at is None:
            return
        ttft, gaps = sequence.first_at - self.began, sequence.drawn - 1
        itl = (sequence.last_at - sequence.first_at) / gaps if gaps else 0.0
        metrics.observe("vllm:time_to_first_token_seconds", ttft, model_name=name)
        if gaps:
            metrics.observe("vllm:inter_token_latency_seconds", itl, gaps, model_name=name)
        if (
            good
            and ttft <= self._settings.goal_ttft_seconds
            and itl <= self._settings.goal_itl_seconds
        ):
            metrics.add("mor_jax:good_requests_total", model_name=name)
