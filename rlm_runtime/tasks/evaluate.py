"""Measure models on long-context tasks: alone, with a REPL, and as a Recursive Language Model, by
length.

For the command line: `rlm eval` is `evaluate(tasks=args.task, lengths=args.lengths.split(","),
...)`; every argument is plain. `evaluate(..., show=True)` prints progress to standard error; the
caller prints `result.table()` (rich) and names `result.files`. UsageError before anything is run;
Ctrl-C leaves what was finished in `out`, and the same call goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlm_runtime.errors import LMError, RlmError, SandboxError, UsageError
from rlm_runtime.lms.base import LM, Message, Sampling, Usage
from rlm_runtime.rlm.blanks import no_answer
from rlm_runtime.tasks import get, parse_length
from rlm_runtime.tasks.base import Example, Task, Tokens, text_of
from rlm_runtime.tasks.results import (
    Row,
    TaskSummary,
    append_row,
    read_rows,
    summarize,
    table,
    write_summaries,
)

if TYPE_CHECKING:
    from rlm_runtime.rlm import RLM

BASE_LIMIT = 2_000_000  # tokens: more is not sent to a model whose window nobody knows
SHOWN = 2000  # characters of a reply, question or answer kept in a row
HOPELESS = ("auth", "not_found")  # errors every further call would have as well


@dataclass(frozen=True)
class Evaluation:
    rows: list[Row]
    summaries: list[TaskSummary]
    files: list[Path] = field(default_factory=list)

    def table(self) -> Any:
        """A rich table: `rich.print(evaluation.table())`."""
        return table(self.summaries)


def evaluate(
    tasks: str | Task | Sequence[str | Task],
    lengths: Sequence[int | str] | int | str = ("8k", "32k", "128k"),
    modes: Sequence[str] | str = ("base", "repl", "rlm"),
    *,
    root: LM | str,
    sub: LM | str | None = None,
    samples: int = 10,
    seed: int = 42,
    concurrency: int = 4,
    out: str | Path = "rlm-eval",
    rlm: Mapping[str, Any] | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    tokens: Tokens | None = None,
    keep_contexts: bool = False,
    plot: bool = True,
    show: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> Evaluation:
    """Run every task at every length in every mode, `samples` examples each, and summarize.

    Args:
      tasks: names as in `tasks.TASKS`, with knobs ("s_niah:values=4"), or Task objects.
      lengths: in tokens; "8k" and "1M" are taken.
      modes: base: the model is given the whole context in its prompt (not asked where its window is
        too small); repl: an RLM without sub-calls; rlm: with sub-calls, `rlm["max_depth"]` deep
        (1); rlm2, rlm3, ...: that deep; with +tips (repl+tips, rlm+tips, rlm2+tips): the root is
        given `rlm["tips"]`, or else the tips the task carries.
      root, sub: models or their names.
      rlm: further arguments of `RLM`: budget, limits, environment, tools, log_dir, ...
      sampling: of every call.
      out: folder of results.jsonl (a row a run, appended as it ends), summary.json, summary.csv and
        `<task>.png`. Runs that are in it already, with the same models and settings, are not run
        again.
      tokens: counts the tokens of a text; default: 4 characters are one.
      keep_contexts: leave the contexts in `out`/contexts.
      on_row: called with each finished row.

    Raises UsageError for what cannot be, LMError for a wrong key or an unknown model, and
    SandboxError; a run that fails otherwise is a row with status "error".
    """
    return asyncio.run(
        aevaluate(
            tasks,
            lengths,
            modes,
            root=root,
            sub=sub,
            samples=samples,
            seed=seed,
            concurrency=concurrency,
            out=out,
            rlm=rlm,
            sampling=sampling,
            tokens=tokens,
            keep_contexts=keep_contexts,
            plot=plot,
            show=show,
            on_row=on_row,
        )
    )


async def aevaluate(
    tasks: Any,
    lengths: Any,
    modes: Any,
    *,
    root: LM | str,
    sub: LM | str | None = None,
    samples: int = 10,
    seed: int = 42,
    concurrency: int = 4,
    out: str | Path = "rlm-eval",
    rlm: Mapping[str, Any] | None = None,
    sampling: Any = None,
    tokens: Tokens | None = None,
    keep_contexts: bool = False,
    plot: bool = True,
    show: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> Evaluation:
    """As `evaluate`, in a running event loop."""
    out = Path(out)
    if samples < 1 or concurrency < 1:
        raise UsageError("evaluate: samples and concurrency are at least 1.")
    chosen = [get(t) for t in ([tasks] if isinstance(tasks, str | Task) else tasks)]
    sizes = sorted(
        {parse_length(n) for n in ([lengths] if isinstance(lengths, str | int) else lengths)}
    )
    names = list(dict.fromkeys(m.strip() for m in ([modes] if isinstance(modes, str) else modes)))
    if not chosen or not sizes or not names:
        raise UsageError("evaluate: give at least one task, one length and one mode.")
    with contextlib.ExitStack() as stack:
        runners = _Runners(root, sub, names, dict(rlm or {}), sampling)
        out.mkdir(parents=True, exist_ok=True)
        contexts = (
            out / "contexts"
            if keep_contexts
            else Path(tempfile.mkdtemp(prefix=".contexts-", dir=out))
        )
        if not keep_contexts:
            stack.callback(shutil.rmtree, contexts, ignore_errors=True)
        jobs = [
            _Job(t, n, i, m) for t in chosen for n in sizes for i in range(samples) for m in names
        ]
        wanted = {
            (*_name(job, seed), runners.model, runners.settings(job.mode, job.task)): job
            for job in jobs
        }
        known = {
            k: r
            for k, r in read_rows(out / "results.jsonl").items()
            if k in wanted and r.status != "error"
        }
        todo = [job for key, job in wanted.items() if key not in known]
        progress = stack.enter_context(_progress(show, len(wanted), len(known)))

        def done(row: Row) -> None:
            known[row.key] = row
            append_row(out / "results.jsonl", row)
            progress(row)
            if on_row is not None:
                on_row(row)

        examples = _Examples(contexts, seed, tokens, todo, keep_contexts)
        try:
            if todo:
                await examples.in_thread(
                    ("trial",), _try_lengths, chosen, sizes, seed, tokens, contexts
                )
            await _work(todo, examples, runners, seed, concurrency, done)
        finally:
            await examples.settled()
            await runners.aclose()
    rows = [known[key] for key in wanted if key in known]
    order = {m: i for i, m in enumerate(names)}
    place = {t.name: i for i, t in enumerate(chosen)}
    summaries = sorted(summarize(rows), key=lambda s: (place[s.task], s.length, order[s.mode]))
    write_summaries(out, summaries)
    files = [out / "results.jsonl", out / "summary.json", out / "summary.csv"]
    if plot:
        from rlm_runtime.tasks import plots

        files += await asyncio.to_thread(plots.draw, out, summaries)
    return Evaluation(rows, summaries, files)


def _try_lengths(
    tasks: list[Task], sizes: list[int], seed: int, tokens: Tokens | None, folder: Path
) -> None:
    """A length that cannot be made is an error before anything is spent."""
    for task in tasks:
        for length in {sizes[0], sizes[-1]} if task.bounded else {sizes[0]}:
            task.example(length, seed=seed, folder=folder / "trial", tokens=tokens)
    shutil.rmtree(folder / "trial", ignore_errors=True)


@dataclass(frozen=True)
class _Job:
    task: Task
    length: int
    index: int
    mode: str


def _name(job: _Job, seed: int) -> tuple[Any, ...]:
    return job.task.name, job.length, job.mode, job.index, seed


async def _work(
    jobs: list[_Job],
    examples: _Examples,
    runners: _Runners,
    seed: int,
    concurrency: int,
    done: Callable[[Row], None],
) -> None:
    """All jobs, `concurrency` at a time, in their order. The first hopeless error ends it."""
    queue: Iterator[_Job] = iter(jobs)

    async def worker() -> None:
        for job in queue:
            example = await examples.of(job)
            try:
                done(await runners.row(job, example, seed))
            finally:
                examples.release(job)

    workers = [asyncio.create_task(worker()) for _ in range(min(concurrency, len(jobs)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


class _Examples:
    """Contexts are made when first wanted, shared by the modes, and removed after their last
    run."""

    def __init__(
        self, folder: Path, seed: int, tokens: Tokens | None, jobs: list[_Job], keep: bool
    ):
        self._folder, self._seed, self._tokens, self._keep = folder, seed, tokens, keep
        self._left = Counter(self._window(job) for job in jobs)
        self._made: dict[tuple[Any, ...], asyncio.Task[Any]] = {}

    def _window(self, job: _Job) -> tuple[str, int, int]:
        return job.task.name, job.length, job.index // job.task.per_context

    async def of(self, job: _Job) -> Example:
        def make() -> Example:
            return job.task.example(
                job.length,
                seed=self._seed,
                index=job.index,
                folder=self._folder,
                tokens=self._tokens,
            )

        example: Example = await self.in_thread((job.task.name, job.length, job.index), make)
        return example

    async def in_thread(
        self, key: tuple[Any, ...], function: Callable[..., Any], *args: Any
    ) -> Any:
        """The result for this key, made once. A cancelled caller leaves the thread to `settled`."""
        if key not in self._made:
            self._made[key] = asyncio.create_task(asyncio.to_thread(function, *args))
        return await asyncio.shield(self._made[key])

    async def settled(self) -> None:
        """No thread writes a context any more."""
        await asyncio.gather(*self._made.values(), return_exceptions=True)

    def release(self, job: _Job) -> None:
        window = self._window(job)
        self._left[window] -= 1
        if self._left[window]:
            return
        for key in [
            k
            for k in self._made
            if k[:2] == window[:2] and k[2] // job.task.per_context == window[2]
        ]:
            made = self._made.pop(key)
            if not self._keep and made.done() and not made.cancelled() and made.exception() is None:
                made.result().context.unlink(missing_ok=True)


class _Runners:
    """The modes over one pair of models."""

    def __init__(
        self,
        root: LM | str,
        sub: LM | str | None,
        modes: list[str],
        options: dict[str, Any],
        sampling: Any,
    ):
        from rlm_runtime.lms import resolve
        from rlm_runtime.rlm.options import check_model

        depths: dict[str, int] = {}
        most = options.pop("max_depth", 1)
        for mode in modes:
            match = re.fullmatch(r"base|(repl|rlm([1-9]\d?)?)(\+tips)?", mode)
            if not match:
                raise UsageError(
                    f"unknown mode {mode!r}; expected base, repl, rlm, or rlm2, rlm3, ... for deeper trees; all but base "
                    "also with tips, as in rlm+tips."
                )
            depths[mode] = 0 if mode.startswith(("base", "repl")) else int(match[2] or most)
        if min((depths[m] for m in depths if m.startswith("rlm")), default=1) < 1:
            raise UsageError(
                "mode rlm has sub-calls: max_depth is at least 1 (mode repl is the one without)."
            )
        self.root = resolve(root)
        self.sub = self.root if sub is None or sub == root else resolve(sub)
        self._opened = [
            lm for given, lm in ((root, self.root), (sub, self.sub)) if isinstance(given, str)
        ]
        self.sampling = check_model("sampling", Sampling, sampling)
        self.model = (
            self.root.name if self.sub is self.root else f"{self.root.name}+{self.sub.name}"
        )
        self._depths, self._options, self._given_tips = depths, options, options.pop("tips", None)
        self._rlms: dict[tuple[str, str], RLM] = {}
        if self._given_tips and not any(mode.endswith("+tips") for mode in modes):
            raise UsageError("tips were given, but no mode uses them; add one such as rlm+tips.")
        for mode in depths:  # a wrong option shows before anything is run
            if mode != "base":
                self._make(mode, self._given_tips)

    def _tips(self, mode: str, task: Task) -> str | None:
        """Raises UsageError where the mode asks for tips and there are none."""
        if not mode.endswith("+tips"):
            return None
        tips = self._given_tips or task.tips
        if not tips:
            raise UsageError(
                f"mode {mode}: the task {task.name} carries no tips; give some with --tips FILE."
            )
        return tips

    def _rlm(self, mode: str, task: Task) -> RLM:
        key = mode, task.name
        if key not in self._rlms:
            self._rlms[key] = self._make(mode, self._tips(mode, task))
        return self._rlms[key]

    def _make(self, mode: str, tips: Any) -> RLM:
        from rlm_runtime.rlm import RLM

        return RLM(
            self.root,
            self.sub,
            max_depth=self._depths[mode],
            sampling=self.sampling,
            tips=tips,
            **self._options,
        )

    def settings(self, mode: str, task: Task) -> str:
        """What decides the outcome besides models, task and seed, in a few letters."""
        parts = [
            self._depths[mode],
            _plain(self._options) if mode != "base" else "",
            self.sampling.model_dump(),
        ]
        tips = self._tips(mode, task)
        return _hash([*parts, tips] if tips else parts)

    async def row(self, job: _Job, example: Example, seed: int) -> Row:
        """Run and score. Raises only what would befall every other run too."""
        task, length, mode, index, _ = _name(job, seed)
        fields = {
            "task": task,
            "length": length,
            "mode": mode,
            "index": index,
            "seed": seed,
            "model": self.model,
            "settings": self.settings(mode, job.task),
            "context_bytes": example.context.stat().st_size,
            "question": example.question[:SHOWN],
            "expected": text_of(example.answer)[:SHOWN],
        }
        began = time.monotonic()
        try:
            found = await (
                self._base(job.task, example) if mode == "base" else self._run(job, example)
            )
        except (LMError, SandboxError) as error:
            if isinstance(error, SandboxError) or error.kind in HOPELESS:
                raise
            status = (
                "over_window" if mode == "base" and error.kind == "context_overflow" else "error"
            )
            found = {"status": status, "error": str(error)[:SHOWN], **_spent(error)}
        except RlmError as error:
            found = {
                "status": "error",
                "error": f"{type(error).__name__}: {error}"[:SHOWN],
                **_spent(error),
            }
        reply = found.pop("answer", None)
        if found.get("status", "ok") == "ok":
            found["score"] = await asyncio.to_thread(job.task.score, example, reply)
        found.setdefault("seconds", round(time.monotonic() - began, 4))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Row(**fields, **found, reply=text_of(reply)[:SHOWN], finished_at=now)

    async def _base(self, task: Task, example: Example) -> dict[str, Any]:
        """The model alone, the whole context in its prompt."""
        window = self.root.window or BASE_LIMIT
        room = window - (self.sampling.max_tokens or task.reply_tokens)
        over = {
            "status": "over_window",
            "error": f"the prompt does not fit the window of {window:,} tokens",
        }
        if example.context.stat().st_size > 16 * window:  # not worth counting
            return over
        messages = [Message(role="user", content=await asyncio.to_thread(example.prompt))]
        if await asyncio.to_thread(self.root.count_tokens, messages) > room:
            return over
        reply = await self.root.complete(messages, sampling=self.sampling)
        blank = no_answer(self.root, reply, reply.text)
        if blank is not None:
            raise blank
        usage = reply.usage if reply.usage.calls else reply.usage.model_copy(update={"calls": 1})
        return {"answer": reply.text, "stop_reason": reply.finish_reason, **_usage(usage)}

    async def _run(self, job: _Job, example: Example) -> dict[str, Any]:
        result = await self._rlm(job.mode, job.task).acompletion(example.context, example.question)
        if result.stop_reason == "error" and result.answer is None:
            return {
                "status": "error",
                "error": (result.error or "the run failed")[:SHOWN],
                **_result(result),
            }
        return {"answer": result.answer, **_result(result)}

    async def aclose(self) -> None:
        for lm in self._opened:
            with contextlib.suppress(Exception):
                await lm.aclose()


def _result(result: Any) -> dict[str, Any]:
    return {
        "stop_reason": result.stop_reason,
        "seconds": round(result.seconds, 4),
        "turns": result.turns,
        "sub_calls": result.sub_calls,
        "trajectory": str(result.trajectory) if result.trajectory else None,
        **_usage(result.usage),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "calls": usage.calls,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cost_usd": usage.cost_usd,
    }


def _spent(error: Exception) -> dict[str, Any]:
    """What a failed run cost, where the error says."""
    result = getattr(error, "result", None)
    return _result(result) if result is not None else {}


def _plain(value: Any) -> Any:
    """Settings as JSON, the same for the same settings in another process."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {
            str(k): _plain(v)
            for k, v in value.items()
            if k not in ("log_dir", "on_event", "concurrency")
        }
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return (
        getattr(value, "__qualname__", None)
        or getattr(value, "name", None)
        or type(value).__qualname__
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


@contextlib.contextmanager
def _progress(show: bool, total: int, known: int) -> Iterator[Callable[[Row], None]]:
    """A bar on a terminal, a line a run elsewhere, nothing unless asked for."""
    if not show:
        yield lambda row: None
        return
    if not sys.stderr.isatty():
        if known:
            print(f"{known} of {total} runs are there already", file=sys.stderr)
        count = [known]

        def line(row: Row) -> None:
            count[0] += 1
            print(f"[{count[0]}/{total}] {_line(row)}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=known)
        yield lambda row: bar.update(task, advance=1, description=_line(row))


def _line(row: Row) -> str:
    score = row.status.replace("_", " ") if row.score is None else f"{row.score:.2f}"
    cost = "" if row.cost_usd is None else f", ${row.cost_usd:.4f}"
    return f"{row.task} {row.length:,} {row.mode} #{row.index}: {score}, {row.calls} calls, {row.seconds:.1f} s{cost}"
