"""Several completions in one REPL: variables stay, each new prompt is `context_1`, `context_2`, ..., the conversation
goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import Usage
from rlm_runtime.rlm.api import acontext_of
from rlm_runtime.rlm.blocking import LoopThread
from rlm_runtime.rlm.options import Options
from rlm_runtime.rlm.results import RLMResult
from rlm_runtime.rlm.run import CancelEvent, Run, SessionState
from rlm_runtime.structured import Shape


class Session:
    """Made by `RLM.session()`; used as a context manager, `with` or `async with`.

    The budget holds for each completion. Completions of one session run one after the other. A worker that had to be
    restarted has its contexts again, and the model is told which variables are gone.
    """

    def __init__(self, options: Options, make_state: Callable[[], SessionState]):
        self._options, self._make_state = options, make_state
        self._state: SessionState | None = None
        self._thread: LoopThread | None = None
        self._turn: asyncio.Lock | None = None
        self._closed = False
        self.usage = Usage()  # of all completions so far

    # -- async ------------------------------------------------------------------------------------------------------------
    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def acompletion(
        self, prompt: Any, question: str | None = None, *, output: Any = None, cancel: CancelEvent | None = None
    ) -> RLMResult:
        """As `RLM.acompletion`, in this session's REPL."""
        if self._thread is not None:
            raise UsageError("this session is used with `with`; call `completion`, or open it with `async with`.")
        return await self._run(prompt, question, output, cancel, interruptible=False)

    async def areset(self) -> None:
        """Begin anew: another REPL, an empty conversation."""
        async with self._lock():
            await self._drop()

    async def aclose(self) -> None:
        """Kill the worker. Idempotent."""
        self._closed = True
        await self._drop()

    # -- sync -------------------------------------------------------------------------------------------------------------
    def __enter__(self) -> Session:
        self._thread = LoopThread()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def completion(
        self, prompt: Any, question: str | None = None, *, output: Any = None, cancel: CancelEvent | None = None
    ) -> RLMResult:
        """As `RLM.completion`, in this session's REPL."""
        return self._in_thread().run(lambda: self._run(prompt, question, output, cancel, interruptible=True))

    def reset(self) -> None:
        self._in_thread().run(self.areset)

    def close(self) -> None:
        if self._thread is not None:
            thread, self._thread = self._thread, None
            try:
                thread.run(self.aclose)
            finally:
                thread.close()

    # -- inside -------------------------------------------------------------------------------------------------------------
    async def _run(
        self, prompt: Any, question: str | None, output: Any, cancel: CancelEvent | None, *, interruptible: bool
    ) -> RLMResult:
        shape = Shape.of(output) if output is not None else None
        context = await acontext_of(prompt, question)
        async with self._lock():
            if self._closed:
                raise UsageError("this session is closed; open another with RLM.session().")
            if self._state is None:
                self._state = self._make_state()
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
