"""Expert runs as samples: strategies lead real runs, and what each call was asked and answered is
written down."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import Message
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.rlm import RLM
from rlm_runtime.tasks.base import writing
from rlm_runtime.training import copying, readings
from rlm_runtime.training.expert import Expert, Problem, Say, Strategy, Turns, expert_of
from rlm_runtime.training.samples import Conversation, conversations, spoken
from rlm_runtime.training.splits import check_split, seed_of

# tokens of the contexts, drawn for each sample; experts do not depend on it
LENGTHS = (2000, 4000, 8000)
WINDOW = 1024
# of a token, for the window of the expert's runs: 2.4 to 2.6 were measured (2,048 pieces, random
# strings)
CHARS = 2.3
TURNS = 12
# sub-model replies of a run that are kept, at most: a map of a long context has hundreds alike
SUB_SHARE = 3


@dataclass
class MakeReport:
    """`runs` were made, `written` of them (score 1) with `conversations` in the file; `failed` by
    task and strategy."""

    runs: int = 0
    written: int = 0
    conversations: int = 0
    sub_samples: int = 0
    copies: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lost = ", ".join(f"{n} of {name}" for name, n in sorted(self.failed.items())) or "none"
        return (
            f"{self.runs} runs, {self.written} with score 1 (dropped: {lost}); {self.conversations} conversations of a "
            f"root or child, {self.sub_samples} of a sub-model, {self.copies} exercises in copying"
        )


def estimate(text: str) -> int:
    """Tokens of a text, on the safe side."""
    return math.ceil(len(text) / CHARS)


@dataclass(frozen=True)
class Job:
    task: str
    index: int
    length: int
    strategy: str


def make(
    tasks: Sequence[str],
    samples: int,
    *,
    seed: int = 0,
    split: str = "train",
    out: str | Path,
    lengths: Sequence[int] = LENGTHS,
    window: int | None = WINDOW,
    variant: str = "native",
    readings_share: float = 0.5,
    copies_share: float = 0.0,
    strategies: Sequence[str] = (),
    concurrency: int = 4,
) -> MakeReport:
    """Run `samples` expert runs over the tasks in turn and write their conversations to `out`.

    Every run uses the sandboxed REPL, so messages, outputs and errors are the runtime's own. A run
    whose score is not 1 is dropped and counted. The same arguments give the same file.

    Args:
      lengths: tokens of the contexts.
      window: tokens of the model that is trained; longer histories slide as they will for it. None:
        no bound.
      variant: the prompt variant of the runs.
      readings_share: sub-model samples that are made without a run (`readings`), for each run.
      copies_share: exercises in copying (`copying`), for each run.
      strategies: those that lead runs; default: every one of a task's expert.
    Raises:
      UsageError: an unknown task, split or strategy, no task, or nothing written.
    """
    check_split(split)
    names = list(dict.fromkeys(t.strip() for t in tasks if t.strip()))
    if not names or samples < 1:
        raise UsageError("training make: give at least one task and one sample.")
    chosen = {name: expert_of(name) for name in names}
    rng = random.Random(f"make {seed} {split}")
    jobs = []
    for i in range(samples):
        name = names[i % len(names)]
        index, able = (
            i // len(names),
            [s for s in chosen[name].strategies if not strategies or s in strategies],
        )
        if not able:
            known = ", ".join(chosen[name].strategies)
            raise UsageError(
                f"training make: task {name!r} has none of the strategies {', '.join(strategies)}; it has {known}."
            )
        jobs.append(Job(name, index, rng.choice(list(lengths)), able[(index + i) % len(able)]))
    report = MakeReport()
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rlm-training-") as folder, writing(path) as file:
        for made in _in_order(
            jobs, chosen, seed, split, Path(folder), window, variant, concurrency
        ):
            report.runs += 1
            if made.score < 1:
                report.failed[f"{made.job.task}/{made.job.strategy}"] += 1
                continue
            report.written += 1
            for conversation in made.conversations:
                if conversation.provenance["role"] == "sub":
                    report.sub_samples += 1
                else:
                    report.conversations += 1
                file.write(conversation.line())
        for conversation in readings.samples(round(samples * readings_share), seed, split):
            report.sub_samples += 1
            file.write(conversation.line())
        for conversation in copying.samples(round(samples * copies_share), seed, split):
            report.copies += 1
            file.write(conversation.line())
        if not report.written:
            raise UsageError(
                f"training make: no run ended with score 1, so nothing was written. {report}."
            )
    return report


def drill(samples: int, *, seed: int = 0, split: str = "train", out: str | Path) -> int:
    """Write `samples` drills in copying (`copying.drills`) to `out`; how many there are.

    Raises:
      UsageError: an unknown split, no sample.
    """
    check_split(split)
    if samples < 1:
        raise UsageError("training drill: give at least one sample.")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as file:
        for conversation in copying.drills(samples, seed, split):
            file.write(conversation.line())
    return samples


@dataclass(frozen=True)
class Made:
    job: Job
    score: float
    conversations: tuple[Conversation, ...]


def _in_order(
    jobs: Sequence[Job],
    chosen: dict[str, Expert],
    seed: int,
    split: str,
    folder: Path,
    window: int | None,
    variant: str,
    concurrency: int,
) -> Iterator[Made]:
    """The runs in the order of the jobs, `concurrency` at a time."""

    async def some(part: Sequence[Job]) -> list[Made]:
        return await asyncio.gather(
            *(run(j, chosen[j.task], seed, split, folder, window, variant) for j in part)
        )

    for begin in range(0, len(jobs), concurrency):
        yield from asyncio.run(some(jobs[begin : begin + concurrency]))


async def run(
    job: Job,
    expert: Expert,
    seed: int,
    split: str,
    folder: Path,
    window: int | None = WINDOW,
    variant: str = "native",
) -> Made:
    """One expert run, in the real runtime."""
    problem = _problem(job, expert, seed_of(seed, split), split, folder)
    strategy = expert.strategies[job.strategy]
    actor = Actor(problem, strategy, f"{job} {seed} {split}")
    lm = ScriptedLM(actor.reply, name="expert", window=window, tokens=estimate)
    depth = 2 if strategy.child else 1
    rlm = RLM(
        lm,
        prompt_variant=variant,
        max_depth=depth,
        budget={"turns": TURNS},
        sampling={"max_tokens": 256},
    )
    result = await rlm.acompletion(problem.example.context, problem.example.question)
    score = (
        problem.task.score(problem.example, result.answer)
        if result.stop_reason == "answered"
        else 0.0
    )
    provenance = {
        "source": "expert",
        "task": job.task,
        "strategy": job.strategy,
        "split": split,
        "seed": seed,
        "index": job.index,
        "length": job.length,
        "template": problem.template,
        "score": score,
        "variant": variant,
    }
    calls = [
        (list(call.messages), reply) for call, reply in zip(lm.calls, actor.replies, strict=True)
    ]
    found = [
        dataclasses.replace(c, provenance={**c.provenance, "role": "child"})
        if c.provenance["role"] == "root" and c.messages[1] != spoken("user", actor.opening)
        else c
        for c in conversations(calls, actor.weight, provenance)
    ]
    subs = [c for c in found if c.provenance["role"] == "sub"]
    kept = [c for c in found if c.provenance["role"] != "sub"] + subs[:SUB_SHARE]
    return Made(job, score, tuple(kept))


def _problem(job: Job, expert: Expert, seed: int, split: str, folder: Path) -> Problem:
    """The job's example; of twice the length, and again, where the task needs more room."""
    own = folder / f"{job.task.replace(':', '_')}-{job.index}-{job.length}-{job.strategy}"
    for length in (job.length, 2 * job.length):
        with contextlib.suppress(UsageError):
            return expert.problem(job.task, length, seed, job.index, split, own)
    return expert.problem(job.task, 4 * job.length, seed, job.index, split, own)


class Actor:
    """Plays every model of a run: the strategy leads, a child's strategy leads its child,
    `problem.sub` reads."""

    def __init__(self, problem: Problem, strategy: Strategy, seed: str):
        self._problem, self._strategy, self._seed = problem, strategy, seed
        self._leading: dict[str, Turns] = {}  # by the message that opened the conversation
        self._weights: dict[str, float] = {}
        self.replies: list[str] = []
        self.opening = ""  # the message that opened the root's conversation

    def weight(self, reply: str) -> float:
        return self._weights.get(reply, 1.0)

    def reply(self, messages: Sequence[Message]) -> str:
        text = self._reply(messages)
        self.replies.append(text)
        return text

    def _reply(self, messages: Sequence[Message]) -> str:
        if messages[0].role != "system":
            return self._problem.sub(messages[-1].content)
        opening = messages[1].content
        self.opening = self.opening or opening
        if opening not in self._leading:
            rng = random.Random(self._seed)
            child = self._strategy.child if self._leading else None
            self._leading[opening] = (
                child(self._problem, rng, opening)
                if child
                else self._strategy.run(self._problem, rng)
            )
            said: Say = next(self._leading[opening])
        else:
            said = self._leading[opening].send(messages[-1].content)
        self._weights[said.text] = said.weight
        return said.text
