"""Runs of a model on the experts' problems, with the conversations that made them: what expert
iteration learns from.

Each finished run is a line of a file, so a crash loses none, and the same call goes on from there.
"""

from __future__ import annotations

import asyncio
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlm_runtime.errors import RlmError, UsageError
from rlm_runtime.lms.base import LM, Frozen, Message, Reply, Sampling
from rlm_runtime.rlm import RLM
from rlm_runtime.tasks.results import append_line
from rlm_runtime.training.expert import Problem, expert_of
from rlm_runtime.training.samples import Conversation, conversations
from rlm_runtime.training.splits import TRAIN, seed_of

TURNS = 6


class Rollout(Frozen):
    """One run. `conversations` are its calls as chat samples, `turns` those of the root."""

    task: str
    index: int
    draw: int
    score: float
    turns: int
    stop_reason: str
    conversations: tuple[dict[str, Any], ...] = ()

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.index, self.draw


class Recorder:
    """A model that keeps what it was asked and what it replied."""

    def __init__(self, lm: LM):
        self._lm = lm
        self.calls: list[tuple[list[Message], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    async def complete(self, messages: Sequence[Message], **options: Any) -> Reply:
        reply = await self._lm.complete(messages, **options)
        self.calls.append((list(messages), reply.text))
        return reply


async def roll_out(
    lm: LM,
    tasks: Sequence[str],
    runs: int,
    *,
    out: Path,
    seed: int = 0,
    split: str = TRAIN,
    length: int = 4000,
    draws: int = 1,
    temperature: float = 1.0,
    concurrency: int = 8,
    turns: int = TURNS,
    on_run: Callable[[Rollout], None] = lambda run: None,
) -> list[Rollout]:
    """`runs` problems over the tasks in turn, each led `draws` times by the model, root and sub at
    once. Runs that `out` holds already are not made again.

    Args:
      length: tokens of the contexts.
      temperature: of every call; each call's seed follows from the run, so that the same arguments
        give the same runs wherever the model's arithmetic does.
    Raises:
      UsageError: an unknown task or split, or a score that is not a number from 0 to 1.
    """
    known = {run.key: run for run in read(out)}
    names = [tasks[i % len(tasks)] for i in range(runs)]
    experts = {name: expert_of(name) for name in names}
    jobs = [(n, i, d) for i, n in enumerate(names) for d in range(draws) if (n, i, d) not in known]
    todo = iter(jobs)
    with tempfile.TemporaryDirectory(prefix="rlm-rollouts-") as folder:

        async def worker() -> None:
            for name, index, draw in todo:
                own = Path(folder) / f"{name.replace(':', '_')}-{index}-{draw}"
                problem = await asyncio.to_thread(
                    experts[name].problem, name, length, seed_of(seed, split), index, split, own
                )
                sampling = Sampling(
                    temperature=temperature,
                    max_tokens=256,
                    seed=(seed * 1_000_003 + index * 1009 + draw) % (1 << 31),
                )
                run = await _run(lm, problem, name, index, draw, sampling, turns)
                known[run.key] = run
                await asyncio.to_thread(append_line, out, run.model_dump_json())
                on_run(run)

        workers = [asyncio.create_task(worker()) for _ in range(min(concurrency, len(jobs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return [known[name, i, d] for i, name in enumerate(names) for d in range(draws)]


async def _run(
    lm: LM, problem: Problem, name: str, index: int, draw: int, sampling: Sampling, turns: int
) -> Rollout:
    recorder = Recorder(lm)
    rlm = RLM(recorder, sampling=sampling, budget={"turns": turns})
    try:
        result = await rlm.acompletion(problem.example.context, problem.example.question)
    except RlmError as error:
        return Rollout(
            task=name, index=index, draw=draw, score=0.0, turns=0, stop_reason=f"error: {error}"
        )
    score = 0.0
    if result.stop_reason == "answered":
        score = problem.task.score(problem.example, result.answer)
    if not (isinstance(score, int | float) and math.isfinite(score) and 0 <= score <= 1):
        raise UsageError(
            f"task {name}, run {index}: the score is {score!r}; expected a number from 0 to 1. "
            "Runs that are finished are kept, and the same command goes on."
        )
    provenance = {
        "source": "rollout",
        "task": name,
        "index": index,
        "draw": draw,
        "score": score,
        "template": problem.template,
    }
    spoken = conversations(recorder.calls, lambda reply: 1.0, provenance)
    return Rollout(
        task=name,
        index=index,
        draw=draw,
        score=float(score),
        turns=result.turns,
        stop_reason=result.stop_reason,
        conversations=tuple(json.loads(c.line()) for c in spoken),
    )


def read(path: Path) -> list[Rollout]:
    """The runs of a file; a line that a crash cut off is left out."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(Rollout.model_validate_json(line))
            except ValueError:
                continue
    return found


def best(runs: Iterable[Rollout]) -> list[Conversation]:
    """Of each problem the right run with the fewest turns; the first of equals."""
    chosen: dict[tuple[str, int], Rollout] = {}
    for run in runs:
        at = run.task, run.index
        if run.score == 1 and (at not in chosen or run.turns < chosen[at].turns):
            chosen[at] = run
    return [
        Conversation(tuple(c["messages"]), c["provenance"])
        for run in chosen.values()
        for c in run.conversations
    ]
