"""One run of the soak: do what the plan says, then look whether it ended as every run has to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rlm_soak_plan import CELL_SECONDS, CELLS, DONE, GRACE_SECONDS, TEXTS, Plan
from rlm_runtime import RLM, RLMResult
from rlm_runtime.errors import LMError, RlmError
from rlm_runtime.lms.scripted import ScriptedLM
from rlm_runtime.repl.base import Limits
from rlm_runtime.repl.local import LocalEnvironment
from rlm_runtime.trajectory import NodeEnd, NodeStart, RunEnd, read

PATIENCE = 90.0  # seconds for one run on a machine that is busy with all of them
LIMITS = {"cell_seconds": CELL_SECONDS, "grace_seconds": GRACE_SECONDS, "memory": 1 << 30}
REASONS = re.compile(r"answered|turns|cancelled|error|budget:[a-z_]+")
CONTEXT = "The needle is 7. " * 200


@dataclass
class Report:
    plan: Plan
    outcome: str = "nothing"  # stop reason, or the error's class
    seconds: float = 0.0
    workers: int = 0  # processes started
    problems: list[str] = field(default_factory=list)


@dataclass
class World:
    """What the runs share."""

    folder: Path
    http: Any  # an LM over the loopback server
    threads: ThreadPoolExecutor


class _Run:
    """`plan` while it runs."""

    def __init__(self, plan: Plan, world: World):
        self.plan, self.world, self.report = plan, world, Report(plan)
        self.environments: list[LocalEnvironment] = []
        self.pids: set[int] = set()
        self.event = threading.Event()
        self.folder = world.folder / re.sub(r"\W", "_", plan.seed)
        self.results: list[RLMResult | BaseException] = []
        self._made = random.Random(plan.seed + "/kills")

    # -- the run

    async def go(self) -> Report:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        timers = [loop.call_later(when, self._kill, name) for when, name in self.plan.kills]
        work = asyncio.create_task(self._work(timers))
        done, _ = await asyncio.wait({work}, timeout=PATIENCE)
        for timer in timers:
            timer.cancel()
        if not done:
            self.report.problems.append(f"no end after {PATIENCE:.0f} s")
            work.cancel()
            await asyncio.wait({work}, timeout=PATIENCE)
        elif work.exception() is not None:
            self.report.problems.append(f"the soak itself failed: {work.exception()!r}")
        self.report.seconds = time.monotonic() - began
        self.report.workers = len(self.pids)
        if done:
            await loop.run_in_executor(self.world.threads, self._check)
        return self.report

    async def _work(self, timers: list[asyncio.TimerHandle]) -> None:
        plan, loop = self.plan, asyncio.get_running_loop()
        rlm = self._rlm()
        kind, when = plan.cancel or ("", 0.0)
        if kind == "event":
            timers.append(loop.call_later(when, self.event.set))
        prompt = self._prompt()
        if plan.way == "start":
            run = rlm.start(prompt, "What is it?", cancel=self.event)
            if kind == "run":
                timers.append(loop.call_later(when, run.cancel))
            if plan.disk is not None:
                timers.append(loop.call_later(plan.disk[1], self._hurt_disk, run))
            await self._await(run.result())
        elif plan.way == "task":
            await self._task(
                rlm.acompletion(prompt, "What is it?", cancel=self.event), kind, when, timers
            )
        elif plan.way == "session":
            async with rlm.session() as session:
                await self._task(
                    session.acompletion(prompt, "What is it?", cancel=self.event),
                    kind,
                    when,
                    timers,
                )
                self.event.clear()
                await self._await(session.acompletion("Another text.", "And this?"))
        else:

            def call() -> RLMResult:
                return rlm.completion(prompt, "What is it?", cancel=self.event)

            await self._await(loop.run_in_executor(self.world.threads, call))
        await rlm.aclose()

    async def _task(
        self, work: Any, kind: str, when: float, timers: list[asyncio.TimerHandle]
    ) -> None:
        """As a task of its own, which the plan may cancel."""
        task = asyncio.ensure_future(work)
        if kind in ("task", "task_twice"):
            loop = asyncio.get_running_loop()
            timers.append(loop.call_later(when, task.cancel))
            if kind == "task_twice":
                timers.append(loop.call_later(when + 0.05, task.cancel))
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
        self.results.append(_outcome(task))

    async def _await(self, work: Any) -> None:
        try:
            self.results.append(await work)
        except Exception as e:
            self.results.append(e)

    def _rlm(self) -> RLM:
        plan = self.plan
        budget: dict[str, Any] = {
            "turns": len(plan.replies) + 4,
            "last_call_seconds": 10.0,
            **dict(plan.budget),
        }
        if plan.cancel and plan.cancel[0] == "seconds":
            budget["seconds"] = max(0.05, plan.cancel[1])
        return RLM(
            self._root(),
            self.world.http if plan.sub == "http" else self._sub(),
            max_depth=plan.max_depth,
            budget=budget,
            limits=LIMITS,
            environment=self._environment,
            log_dir=self.folder,
        )

    def _environment(self, limits: Limits) -> LocalEnvironment:
        environment = LocalEnvironment(limits)
        self.environments.append(environment)
        connect = environment._connect

        async def note(*args: Any) -> None:  # every process there ever was
            await connect(*args)
            self.pids.add(environment._process.pid)

        environment._connect = note
        return environment

    def _prompt(self) -> Any:
        if self.plan.context == "json":
            return {"texts": [CONTEXT[:100]] * 20, "n": 20}
        if self.plan.context == "file":
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "context.txt"
            path.write_text(CONTEXT, encoding="utf-8")
            return path
        return CONTEXT

    def _root(self) -> ScriptedLM:
        plan = self.plan
        lines = [_line(name) for name in plan.replies]
        seconds = iter(plan.root_seconds)
        return ScriptedLM(
            [*lines, _cell(DONE)],
            latency=lambda _: next(seconds, 0.0),
            name="root",
            repeat_last=True,
        )

    def _sub(self) -> ScriptedLM:
        """Answers pieces, and leads child RLMs; how long it takes and whether it fails is a matter
        of the prompt."""
        plan = self.plan

        def chance(messages: Any) -> random.Random:
            return random.Random(f"{plan.seed}/{len(messages)}/{messages[-1].content}")

        def answer(messages: Any) -> Any:
            r = chance(messages)
            if plan.sub == "failing" and r.random() < 0.3:
                return LMError(
                    "as planned", kind=r.choice(("server", "timeout", "rate_limit")), model="sub"
                )
            if plan.sub == "buggy" and r.random() < 0.3:
                return ZeroDivisionError("a bug of the client")
            if messages[0].role == "system":  # it leads a child
                name = r.choice(("work", "one_call", "exit", "error", "done", "done"))
                return _cell(DONE if name == "done" else CELLS[name])
            return "sub says so"

        def seconds(messages: Any) -> float:
            r = chance(messages)
            return r.uniform(0, 0.2) if plan.sub == "slow" else r.choice((0.0, 0.002, 0.01))

        return ScriptedLM(answer, latency=seconds, name="sub")

    # -- faults

    def _kill(self, name: str) -> None:
        """One of the workers that there are just now."""
        processes = [e._process for e in self.environments if e._process is not None]
        alive = [p for p in processes if p.popen.returncode is None]
        if alive:
            process = self._made.choice(alive)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, getattr(signal, name))

    def _hurt_disk(self, run: Any) -> None:
        """From here on every write to the trajectory fails: the disk is full, or its folder is
        gone."""
        writer = run._writer
        if writer._descriptor < 0:
            return
        if self.plan.disk[0] == "gone":
            shutil.rmtree(run.folder, ignore_errors=True)
            return
        full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(full, writer._descriptor, inheritable=False)
        os.close(full)

    # -- what must hold

    def _check(self) -> None:
        bad = self.report.problems
        if self._in_a_hurry():
            self._let_it_end()
        for outcome in self.results:
            self._check_outcome(outcome)
        wanted = 2 if self.plan.way == "session" else 1
        if len(self.results) != wanted:
            bad.append(f"{len(self.results)} outcomes instead of {wanted}")
        if self.results:
            self.report.outcome = _name(self.results[0])
        for environment in self.environments:
            if environment._process is not None:
                bad.append("a REPL was not closed")
        for pid in self.pids:
            if _is_alive(pid):
                bad.append(f"worker {pid} is still there")
        self._check_trajectories()
        if not bad:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _in_a_hurry(self) -> bool:
        """Cancelled while it was being cancelled: the caller has gone, without a result; the run
        ends on its own."""
        return self.plan.cancel is not None and self.plan.cancel[0] == "task_twice"

    def _let_it_end(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            runs = (
                [read(f) for f in self.folder.iterdir() if f.is_dir()]
                if self.folder.exists()
                else []
            )
            if all(events.complete for events in runs) and not any(
                e._process for e in self.environments
            ):
                return
            time.sleep(0.02)

    def _check_outcome(self, outcome: Any) -> None:
        bad = self.report.problems
        may_be_cancelled = self.plan.cancel is not None and self.plan.cancel[0].startswith("task")
        if isinstance(outcome, asyncio.CancelledError):
            if not may_be_cancelled:
                bad.append("CancelledError, though nobody cancelled the task")
            result = getattr(outcome, "result", None)
        elif isinstance(outcome, RlmError):
            result = getattr(outcome, "result", None)
            if result is None and "session is closed" not in str(outcome):
                bad.append(f"{type(outcome).__name__} without a result: {outcome}")
        elif isinstance(outcome, RLMResult):
            result = outcome
        else:
            bad.append(f"neither a result nor an error of ours: {outcome!r}")
            return
        if result is not None and not REASONS.fullmatch(result.stop_reason):
            bad.append(f"stop reason {result.stop_reason!r}")

    def _check_trajectories(self) -> None:
        bad, plan = self.report.problems, self.plan
        folders = [f for f in self.folder.iterdir() if f.is_dir()] if self.folder.exists() else []
        if not folders and not (plan.disk and plan.disk[0] == "gone"):
            bad.append("no trajectory")
        ends: list[str] = []
        for folder in folders:
            try:
                events = read(folder)
            except Exception as e:
                if not (plan.disk and plan.disk[0] == "gone" and isinstance(e, RlmError)):
                    bad.append(f"the trajectory cannot be read: {e!r}")
                continue
            types = [e.type for e in events]
            if types[:1] != ["run_start"]:
                bad.append("the trajectory has no beginning")
            if plan.disk is not None:
                notes = [n for r in self._finished() for n in r.notes]
                if types[-1:] != ["run_end"] and not any("incomplete" in n for n in notes):
                    bad.append("the trajectory is incomplete, and the result does not say so")
                continue
            if types[-1:] != ["run_end"]:
                bad.append(f"the trajectory ends in {types[-3:]}")
            ends += [e.stop_reason for e in events if isinstance(e, RunEnd)]
            begun = {e.node for e in events if isinstance(e, NodeStart)}
            ended = {e.node for e in events if isinstance(e, NodeEnd)}
            if begun - ended:
                bad.append(f"{len(begun - ended)} calls without an end in the trajectory")
        # A session goes on in another folder where its first completion ended before it had a REPL.
        reasons = sorted(r.stop_reason for r in self._finished())
        if self._in_a_hurry() and len(reasons) < len(ends) and "cancelled" in ends:
            ends.remove("cancelled")
        if plan.disk is None and sorted(ends) != reasons:
            bad.append(f"stop reasons in the trajectory {sorted(ends)}, in the results {reasons}")

    def _finished(self) -> list[RLMResult]:
        """What the outcomes have in the way of results; an error carries one."""
        found = (
            r if isinstance(r, RLMResult) else getattr(r, "result", None) for r in self.results
        )
        return [r for r in found if r is not None]


async def soak_one(plan: Plan, world: World) -> Report:
    return await _Run(plan, world).go()


def _line(name: str) -> Any:
    if name == "!server":
        return LMError("as planned", kind="server", model="root")
    if name == "!timeout":
        return LMError("as planned", kind="timeout", model="root")
    if name == "!bug":
        return KeyError("a bug of the client")
    return TEXTS[name] if name in TEXTS else _cell(CELLS[name])


def _cell(code: str) -> str:
    return f"Next step.\n```repl\n{code}\n```"


def _outcome(task: asyncio.Task[Any]) -> Any:
    try:
        return task.result()
    except BaseException as e:
        return e


def _name(outcome: Any) -> str:
    result = getattr(outcome, "result", None)
    if isinstance(outcome, RLMResult):
        return outcome.stop_reason
    reason = f" ({result.stop_reason})" if isinstance(result, RLMResult) else ""
    return type(outcome).__name__ + reason


def _is_alive(pid: int) -> bool:
    """Also as a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return int(status.rpartition(")")[2].split()[1]) == os.getpid()
