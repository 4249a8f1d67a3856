"""The RLMs that a server offers by name, with the server's limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlm_runtime.budget import Budget
from rlm_runtime.lms.base import LM, Sampling
from rlm_runtime.serve.rlm.schemas import ChatRequest

if TYPE_CHECKING:
    from rlm_runtime.rlm import RLM


@dataclass(frozen=True)
class ServedModel:
    """`options` are further arguments of `RLM`: tools, limits, environment, ..."""

    name: str
    root: LM
    sub: LM | None = None
    max_depth: int = 1
    budget: Budget = field(default_factory=Budget)  # what one request may use at most
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(
        self,
        request: ChatRequest,
        *,
        log_dir: Path | None,
        on_event: Callable[[Any], None],
        budget: Budget,
        depth: int,
    ) -> RLM:
        """The RLM for one request."""
        from rlm_runtime.rlm import RLM

        return RLM(
            self.root,
            self.sub,
            max_depth=depth,
            budget=budget,
            log_dir=log_dir,
            on_event=on_event,
            root_sampling=Sampling(
                temperature=request.temperature, top_p=request.top_p, seed=request.seed
            ),
            **self.options,
        )

    def check(self) -> None:
        """Raises UsageError for options an RLM does not take, before the first request does."""
        from rlm_runtime.rlm import RLM

        RLM(self.root, self.sub, max_depth=self.max_depth, budget=self.budget, **self.options)

    def bounds(self, request: ChatRequest) -> tuple[Budget, int]:
        """What this request may use: what it asks for, cut to the server's limits."""
        asked = (
            request.rlm.budget.model_dump(exclude_none=True)
            if request.rlm and request.rlm.budget
            else {}
        )
        # OpenAI counts hidden reasoning in it, and so do we
        if request.max_completion_tokens is not None:
            asked["output_tokens"] = min(
                request.max_completion_tokens, asked.get("output_tokens", 2**53)
            )
        limits = self.budget.model_dump()
        for name, value in asked.items():
            limits[name] = value if limits[name] is None else min(value, limits[name])
        depth = self.max_depth
        if request.rlm and request.rlm.max_depth is not None:
            depth = min(depth, request.rlm.max_depth)
        return Budget(**limits), depth
