"""One conversation with one REPL: what sub-calls, compaction and the window need to know of it, and
its model calls."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from rlm_runtime import prompts
from rlm_runtime.lms.base import LM, Message, Reply
from rlm_runtime.repl.base import Environment
from rlm_runtime.rlm.history import History
from rlm_runtime.rlm.tree import Meter, Tree
from rlm_runtime.structured import Shape
from rlm_runtime.tools import Tool

# after the first request, which is on its way by then; models take longer to reply
WARM_SECONDS = 0.25


class Conversation:
    """The state of a node. `id`, `turn` and `cell` name the place in the trajectory."""

    def __init__(
        self,
        tree: Tree,
        environment: Environment,
        *,
        id: str,
        depth: int,
        lm: LM,
        tools: Mapping[str, Tool],
        meter: Meter,
        question: str | None,
        shape: Shape | None,
        history: History | None,
    ) -> None:
        self.tree, self.environment, self.lm, self.tools = tree, environment, lm, tools
        self.id, self.depth, self.meter, self.question, self.shape = (
            id,
            depth,
            meter,
            question,
            shape,
        )
        self.history = history or History()
        variant = tree.options.variant_of(lm)
        self.native, self.words = variant == "native", prompts.words_of(variant)
        self.turn = self.cell = 0
        self.turns = 0  # replies so far, without the last call's
        self.began = 0.0  # of the newest call, by time.monotonic()

    @property
    def is_root(self) -> bool:
        return self.id == "0"

    async def call(
        self, messages: list[Message], *, last: bool = False, estimate: int | None = None
    ) -> Reply:
        """A call of the node's own model."""
        budget = self.tree.ledger.budget
        if estimate is None and (budget.input_tokens is not None or budget.usd is not None):
            estimate = self.history.tokens(self.lm)
        if self.is_root and not last:  # room for this turn's report and the last call's own words
            self.tree.ledger.keep_for_last_call(2 * (estimate or 0) + 500, self.lm.price)
        self.began = time.monotonic()
        loop = asyncio.get_running_loop()
        warm = None
        if self.turn == 0:
            warm = loop.call_later(WARM_SECONDS, in_time, loop.run_in_executor, None, parser)
        try:
            return await self.tree.ask(
                self.lm,
                messages,
                depth=self.depth,
                meter=self.meter,
                sampling=self.tree.options.root_sampling,
                estimate=estimate,
                last=last and self.is_root,
            )
        finally:
            if warm:  # a loop that is closing has no threads for it
                warm.cancel()


def in_time(work: Callable[..., object], *args: Any) -> None:
    """Work done early, for speed: skipped where the loop is ending, or no thread can be had."""
    with contextlib.suppress(RuntimeError):
        work(*args)


def parser() -> Any:
    """The parser of replies, imported while the first one is awaited."""
    from rlm_runtime import parsing

    return parsing
