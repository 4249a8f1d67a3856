"""`RLM`: a language model whose prompt is a variable, not a message."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlm_runtime.budget import Budget
from rlm_runtime.context import Context
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import LM, Sampling, Usage
from rlm_runtime.prompts import VARIANTS
from rlm_runtime.repl.base import Environment, Limits
from rlm_runtime.rlm import blocking, options
from rlm_runtime.rlm.blocking import LoopThread
from rlm_runtime.rlm.results import RLMResult
from rlm_runtime.rlm.run import CancelEvent, Run, SessionState
from rlm_runtime.structured import Shape
from rlm_runtime.tools import Tools, toolbox
from rlm_runtime.trajectory import AnyEvent


class RLM:
    """A Recursive Language Model over any LMs.

    The prompt becomes the variable `context` in a sandboxed Python REPL. The root LM sees what it
    is, not what it says; it writes code, which reads the context, asks sub-LMs about pieces, and
    sets `answer`.

    Args:
      root: the model that leads: an LM, or a name such as "openai:gpt-5-mini".
      sub: the model that `llm_query` asks and that leads child RLMs; default: the root.
      models: further models by the name under which a cell may ask for them: `llm_query(...,
        model="big")`.
      models_by_depth: which model at which depth (0 is the root), before `root` and `sub`.
      max_depth: 0: no sub-calls; 1: `rlm_query` is a plain call; d: child RLMs down to depth d - 1.
      tools, sub_tools: functions (or values by name) for the root's REPL; for sub-LMs and the REPLs
        of child RLMs.
      budget, limits: `Budget` and `Limits`, or dicts of their fields.
      environment: "local", "bubblewrap", "docker", "unconfined", or a function of `Limits` that
        makes an `Environment`.
      environment_options: for an environment chosen by name: `policy` (a `SandboxPolicy`: which
        layers may be missing) and `packages` (installed packages that cells may import).
      concurrency: model calls in flight at once, over the whole tree.
      max_repls: live REPLs of child RLMs at one depth; more wait.
      log_dir: where runs leave their trajectories, a folder each; None: in memory, up to a bound.
      system_prompt: instead of the built-in one, for the root; `{repl}`, `{limits}`, `{finish}` in
        it stand for the sections that describe this REPL.
      tips: a text, or several, on how contexts of this kind are best worked. The root gets them
        with its first task, apart from the system prompt, so that they can be switched and measured
        (`rlm eval --modes rlm,rlm+tips`).
      prompt_variant: which built-in system prompt (`prompts.VARIANTS`); default: what suits the
        model's name. "native" is for models trained on `rlm_runtime.training` data: short words,
        short outputs, a history that slides.
      sub_system_prompt: a system message before the prompt of every plain sub-LM call; default:
        none, or with `sub_tools` one that says what they are for.
      compact_at: share of the root model's window at which its history is replaced by a summary;
        `window`: tokens of the window, for models that do not say.
      on_event: called with every event of the trajectory as it happens; or an object whose
        `for_run(run_id)` gives such a function for each run.
      verbose: show progress on standard error: turns, code, outputs, tokens.
      sampling: a `Sampling` or a dict, for all calls; root_sampling, sub_sampling: instead of it,
        for nodes that lead and for plain calls.
      sub_rounds: rounds of tool calls a sub-LM may take before it must answer.
      schema_retries: how often a sub-LM is told that its reply does not fit the schema.

    Raises UsageError for what cannot be.
    """

    def __init__(
        self,
        root: LM | str,
        sub: LM | str | None = None,
        *,
        models: Mapping[str, LM | str] | None = None,
        models_by_depth: Mapping[int, LM | str] | Sequence[LM | str | None] | None = None,
        max_depth: int = 1,
        tools: Tools | None = None,
        sub_tools: Tools | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
        environment: str | Callable[[Limits], Environment] = "local",
        environment_options: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        max_repls: int | None = None,
        log_dir: Path | str | None = None,
        system_prompt: str | None = None,
        prompt_variant: str | None = None,
        tips: str | Sequence[str] | None = None,
        sub_system_prompt: str | None = None,
        compact_at: float = 0.85,
        window: int | None = None,
        on_event: Callable[[Any], None] | None = None,
        verbose: bool = False,
        sampling: Sampling | Mapping[str, Any] | None = None,
        root_sampling: Sampling | Mapping[str, Any] | None = None,
        sub_sampling: Sampling | Mapping[str, Any] | None = None,
        sub_rounds: int = 5,
        schema_retries: int = 2,
    ):
        check_int = options.check_int
        for where, text in (
            ("system_prompt", system_prompt),
            ("sub_system_prompt", sub_system_prompt),
        ):
            if text is not None and not (isinstance(text, str) and text.strip()):
                raise UsageError(f"{where}: expected a text, got {text!r}.")
        if prompt_variant is not None and prompt_variant not in VARIANTS:
            raise UsageError(
                f"prompt_variant: expected one of {', '.join(VARIANTS)}, got {prompt_variant!r}."
            )
        if (
            isinstance(compact_at, bool)
            or not isinstance(compact_at, int | float)
            or not 0.1 <= compact_at <= 1
        ):
            raise UsageError(
                f"compact_at: expected a share of the window from 0.1 to 1, got {compact_at!r}."
            )
        if on_event is not None and not callable(on_event) and not hasattr(on_event, "for_run"):
            raise UsageError(f"on_event: expected a function of one event, got {on_event!r}.")
        environment_options = dict(environment_options or {})
        name, make = _environment(environment, environment_options)
        root_lm = options.check_lm(root, "root")
        sub_lm = root_lm if sub is None or sub == root else options.check_lm(sub, "sub")
        self._options = options.Options(
            root=root_lm,
            sub=sub_lm,
            models={n: options.check_lm(lm, f"models[{n!r}]") for n, lm in (models or {}).items()},
            by_depth=options.check_by_depth(models_by_depth),
            max_depth=check_int("max_depth", max_depth, 0, options.MAX_DEPTH),
            tools=toolbox(tools, "tools"),
            sub_tools=toolbox(sub_tools, "sub_tools"),
            budget=options.check_model("budget", Budget, budget),
            limits=options.check_model("limits", Limits, limits),
            environment=name,
            make_environment=make,
            concurrency=check_int("concurrency", concurrency, 1),
            max_repls=options.default_repls()
            if max_repls is None
            else check_int("max_repls", max_repls, 1),
            log_dir=Path(log_dir) if log_dir is not None else None,
            system_prompt=system_prompt,
            prompt_variant=prompt_variant,
            tips=options.check_tips(tips),
            packages=tuple(environment_options.get("packages", ())),
            sub_system_prompt=sub_system_prompt,
            compact_at=compact_at,
            window=None if window is None else check_int("window", window, 256),
            on_event=on_event,
            verbose=bool(verbose),
            root_sampling=options.check_model(
                "root_sampling", Sampling, sampling if root_sampling is None else root_sampling
            ),
            sub_sampling=options.check_model(
                "sub_sampling", Sampling, sampling if sub_sampling is None else sub_sampling
            ),
            sub_rounds=check_int("sub_rounds", sub_rounds, 0),
            schema_retries=check_int("schema_retries", schema_retries, 0),
        )
        options.check_prices(self._options)
        passed = {id(lm) for lm in (root, sub, *(models or {}).values(), *_values(models_by_depth))}
        self._own = [lm for lm in self._options.every_lm() if id(lm) not in passed]

    # -- one completion ----------------------------------------------------------------------------
    def completion(
        self,
        prompt: Any,
        question: str | None = None,
        *,
        output: Any = None,
        cancel: CancelEvent | None = None,
    ) -> RLMResult:
        """Answer `question` over `prompt`: a str, bytes, list, dict, chat messages, a DataFrame,
        the Path of a file or folder, a list of Paths, or a `Context`.

        `output`: a pydantic model, a type or a JSON schema that the answer must fit. Setting
        `cancel` ends the run with what it has, and so does a first Ctrl-C. Raises UsageError and
        ContextError for wrong arguments, and LMError or SandboxError where the run failed with
        nothing to show (`error.result` has usage and trajectory); never for what a model or a cell
        does."""
        shape, context = (
            Shape.of(output) if output is not None else None,
            context_of(prompt, question),
        )

        async def work() -> RLMResult:
            return await Run(
                self._options, context, question, shape, cancel=cancel
            ).through_interrupts()

        return blocking.run(work)

    async def acompletion(
        self,
        prompt: Any,
        question: str | None = None,
        *,
        output: Any = None,
        cancel: CancelEvent | None = None,
    ) -> RLMResult:
        """As `completion`. Cancelling the task ends the run, its calls and workers, and raises
        CancelledError, whose attribute `result` is the partial result."""
        shape = Shape.of(output) if output is not None else None
        context = await acontext_of(prompt, question)
        return await Run(self._options, context, question, shape, cancel=cancel).to_the_end()

    def start(
        self,
        prompt: Any,
        question: str | None = None,
        *,
        output: Any = None,
        cancel: CancelEvent | None = None,
    ) -> Run:
        """Begin a completion in the running event loop: `run.cancel()`, `await run.result()`."""
        shape = Shape.of(output) if output is not None else None
        return Run(self._options, context_of(prompt, question), question, shape, cancel=cancel)

    async def stream(
        self,
        prompt: Any,
        question: str | None = None,
        *,
        output: Any = None,
        cancel: CancelEvent | None = None,
    ) -> AsyncIterator[AnyEvent]:
        """The events of a completion as they happen; the last one, a `RunEnd`, holds the answer.

        Raises what `completion` raises, at the end. Leaving the loop early ends the run once the
        iterator is closed (`contextlib.aclosing` does it at once)."""
        run = self.start(prompt, question, output=output, cancel=cancel)
        try:
            async for event in run.events():
                yield event
            await run.result()
        finally:
            await run.end()

    # -- many completions --------------------------------------------------------------------------
    def session(self) -> Session:
        """Completions that share one REPL and one conversation: `with rlm.session() as s:
        s.completion(...)`, or `async with` and `s.acompletion(...)`."""
        return Session(self._options, self._session_state)

    def _session_state(self) -> SessionState:
        return SessionState(self._options.environment_for(0))

    @property
    def options(self) -> options.Options:
        """Validated options with defaults filled in."""
        return self._options

    async def aclose(self) -> None:
        """Close the models that this object made from names; models that were passed in are left
        alone."""
        for lm in self._own:
            await lm.aclose()

    def close(self) -> None:
        """As `aclose`."""
        blocking.run(self.aclose)

    async def __aenter__(self) -> RLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    def __enter__(self) -> RLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Session:
    """Several completions in one REPL and one conversation, made by `RLM.session()`. Use it with
    `with` or `async with`.

    Variables stay. Each new prompt is `context_1`, `context_2`, ...

    The budget holds for each completion. Completions of one session run one after the other. A
    worker that had to be restarted has its contexts again, and the model is told which variables
    are gone.
    """

    def __init__(self, chosen: options.Options, make_state: Callable[[], SessionState]):
        self._options, self._make_state = chosen, make_state
        self._state: SessionState | None = None
        self._thread: LoopThread | None = None
        self._turn: asyncio.Lock | None = None
        self._closed = False
        self.usage = Usage()  # of all completions so far

    # -- async -------------------------------------------------------------------------------------
    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def acompletion(
        self,
        prompt: Any,
        question: str | None = None,
        *,
        output: Any = None,
        cancel: CancelEvent | None = None,
    ) -> RLMResult:
        """As `RLM.acompletion`, in this session's REPL."""
        if self._thread is not None:
            raise UsageError(
                "this session is used with `with`; call `completion`, or open it with `async with`."
            )
        return await self._run(prompt, question, output, cancel, interruptible=False)

    async def areset(self) -> None:
        """Begin anew: another REPL, an empty conversation."""
        async with self._lock():
            await self._drop()

    async def aclose(self) -> None:
        """Kill the worker. Idempotent."""
        self._closed = True
        await self._drop()

    # -- sync --------------------------------------------------------------------------------------
    def __enter__(self) -> Session:
        self._thread = LoopThread()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def completion(
        self,
        prompt: Any,
        question: str | None = None,
        *,
        output: Any = None,
        cancel: CancelEvent | None = None,
    ) -> RLMResult:
        """As `RLM.completion`, in this session's REPL."""
        return self._in_thread().run(
            lambda: self._run(prompt, question, output, cancel, interruptible=True)
        )

    def reset(self) -> None:
        self._in_thread().run(self.areset)

    def close(self) -> None:
        if self._thread is not None:
            thread, self._thread = self._thread, None
            try:
                thread.run(self.aclose)
            finally:
                thread.close()

    # -- inside ------------------------------------------------------------------------------------
    async def _run(
        self,
        prompt: Any,
        question: str | None,
        output: Any,
        cancel: CancelEvent | None,
        *,
        interruptible: bool,
    ) -> RLMResult:
        shape = Shape.of(output) if output is not None else None
        context = await acontext_of(prompt, question)
        async with self._lock():
            if self._closed:
                raise UsageError("this session is closed; open another with RLM.session().")
            if self._state is None:
                self._state = self._make_state()
            result: RLMResult | None = None
            run = Run(self._options, context, question, shape, session=self._state, cancel=cancel)
            try:
                result = await (run.through_interrupts() if interruptible else run.to_the_end())
            except BaseException as e:
                result = getattr(e, "result", None)
                raise
            finally:
                if result is not None:
                    self.usage = self.usage + result.usage
                if not self._state.started:  # no worker came up: the next completion tries another
                    await self._drop()
            return result

    async def _drop(self) -> None:
        state, self._state = self._state, None
        if state is not None:
            await state.environment.aclose()

    def _lock(self) -> asyncio.Lock:
        if self._turn is None:
            self._turn = asyncio.Lock()
        return self._turn

    def _in_thread(self) -> LoopThread:
        if self._thread is None:
            raise UsageError("this session is not open: use `with rlm.session() as s:`.")
        return self._thread


def context_of(prompt: Any, question: str | None) -> Context:
    if question is not None and not isinstance(question, str):
        raise UsageError(f"question: expected a text, got {type(question).__name__}.")
    return Context.of(prompt)


async def acontext_of(prompt: Any, question: str | None) -> Context:
    """As `context_of`; what reads files does so in a thread, as a document or a large folder takes
    seconds."""
    of_paths = isinstance(prompt, os.PathLike) or (
        isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], os.PathLike)
    )
    if of_paths and (question is None or isinstance(question, str)):
        return await asyncio.to_thread(Context.of, prompt)
    return context_of(prompt, question)


def _values(by_depth: Mapping[int, Any] | Sequence[Any] | None) -> list[Any]:
    return list(by_depth.values()) if isinstance(by_depth, Mapping) else list(by_depth or ())


def _environment(chosen: Any, kwargs: dict[str, Any]) -> tuple[str, options.MakeEnvironment]:
    if callable(chosen):
        if kwargs:
            raise UsageError("environment_options: only for an environment chosen by name.")
        return getattr(chosen, "__name__", type(chosen).__name__), chosen
    from rlm_runtime import repl  # its parts are imported when the first run starts

    if chosen not in repl.ENVIRONMENTS:
        raise UsageError(
            f"environment: expected one of {', '.join(repl.ENVIRONMENTS)} or a function, got {chosen!r}."
        )

    def make(limits: Limits) -> Environment:
        try:
            return repl.make(chosen, limits, **kwargs)
        except TypeError as e:
            raise UsageError(f"environment_options: {e}") from e

    if kwargs:
        make(Limits())  # so that a wrong one is refused here, not in the first run
    return chosen, make
