"""The options of a run, and their validation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rlm_runtime.budget import Budget
from rlm_runtime.errors import UsageError
from rlm_runtime.lms.base import LM, Sampling
from rlm_runtime.prompts import variant_for
from rlm_runtime.prompts.native import OUTPUT_CHARS
from rlm_runtime.repl.base import Environment, Limits
from rlm_runtime.rlm.blanks import WINDOWS, Windows
from rlm_runtime.tools import Tool

MakeEnvironment = Callable[[Limits], Environment]
MAX_DEPTH = 16  # deeper trees are a mistake: their cost is exponential


def default_repls() -> int:
    """Live REPLs of child RLMs at one depth: mostly they wait for their models, but each is a
    process."""
    return min(32, 4 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Options:
    root: LM
    sub: LM
    models: Mapping[str, LM]  # what `llm_query(..., model=name)` may name
    by_depth: Mapping[int, LM]
    max_depth: int
    tools: Mapping[str, Tool]
    sub_tools: Mapping[str, Tool]
    budget: Budget
    limits: Limits
    environment: str  # its name, for the record
    make_environment: MakeEnvironment
    concurrency: int = 64
    max_repls: int = field(default_factory=default_repls)
    log_dir: Path | None = None
    system_prompt: str | None = None
    prompt_variant: str | None = None
    tips: str | None = None
    packages: tuple[str, ...] = ()  # that cells may import, for the prompt
    sub_system_prompt: str | None = None
    compact_at: float = 0.85
    window: int | None = None
    on_event: Callable[[Any], None] | None = None
    root_sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    sub_sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    sub_rounds: int = 5
    schema_retries: int = 2
    verbose: bool = False
    windows: Windows = WINDOWS

    def node_lm(self, depth: int) -> LM:
        """The model that leads an RLM node at this depth."""
        return self.by_depth.get(depth) or (self.root if depth == 0 else self.sub)

    def call_lm(self, depth: int, name: str | None = None) -> LM:
        """The model of a plain call whose node is at this depth. Raises UsageError for a name that
        is not allowed."""
        if name is None:
            return self.by_depth.get(depth) or self.sub
        if name in self.models:
            return self.models[name]
        allowed = ", ".join(sorted(self.models)) or "none by name"
        raise UsageError(
            f"unknown model {name!r}; allowed: {allowed}. Leave `model` out for the default."
        )

    def window_of(self, lm: LM) -> int | None:
        """Tokens the model holds: what it says, else what the user says; less where its endpoint
        cut a prompt."""
        known = [w for w in (getattr(lm, "window", None) or self.window, self.windows.of(lm)) if w]
        return min(known, default=None)

    def variant_of(self, lm: LM) -> str:
        """The prompt variant a node led by `lm` is spoken to in."""
        return self.prompt_variant or getattr(lm, "prompt_variant", None) or variant_for(lm.name)

    def limits_for(self, lm: LM) -> Limits:
        """The REPL's limits for a node led by `lm`: what a cell shows must leave room in a small
        window."""
        window = self.window_of(lm)
        most = (
            max(500, int(0.6 * window)) if window else self.limits.output_chars
        )  # 15 % of it, at 4 characters a token
        if self.variant_of(lm) == "native":
            most = min(most, OUTPUT_CHARS)
        if most >= self.limits.output_chars:
            return self.limits
        return self.limits.model_copy(update={"output_chars": most})

    def environment_for(self, depth: int) -> Environment:
        """A REPL, not started, for a node at this depth."""
        return self.make_environment(self.limits_for(self.node_lm(depth)))

    def every_lm(self) -> list[LM]:
        unique = {
            id(lm): lm
            for lm in (self.root, self.sub, *self.models.values(), *self.by_depth.values())
        }
        return list(unique.values())


def check_lm(thing: Any, where: str) -> LM:
    """An LM, or the one a name like "openai:gpt-5-mini" stands for. Raises UsageError."""
    if isinstance(thing, str):
        from rlm_runtime.lms import resolve  # clients are imported when one is asked for

        return resolve(thing)
    missing = [m for m in ("complete", "count_tokens", "price", "name") if not hasattr(thing, m)]
    if missing:
        raise UsageError(
            f"{where}: expected a language model or a name like 'openai:gpt-5-mini', got {type(thing).__name__}"
            f" (it has no {', '.join(missing)})."
        )
    lm: LM = thing
    return lm


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name}: expected a whole number {bound}, got {value!r}.")
    return value


def check_model(name: str, kind: type[BaseModel], value: Any) -> Any:
    """An instance of a settings class, or the one a dict stands for. Raises UsageError naming field
    and choices."""
    if isinstance(value, kind):
        return value
    if value is None:
        return kind()
    if not isinstance(value, Mapping):
        raise UsageError(
            f"{name}: expected {kind.__name__} or a dict of its fields, got {type(value).__name__}."
        )
    try:
        return kind(**value)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(p) for p in first["loc"])
        known = (
            f" Fields: {', '.join(kind.model_fields)}."
            if first["type"] == "extra_forbidden"
            else ""
        )
        raise UsageError(f"{name}.{where}: {first['msg']}.{known}") from e


def check_by_depth(value: Mapping[int, Any] | Sequence[Any] | None) -> dict[int, LM]:
    if value is None:
        return {}
    pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {
        check_int("models_by_depth", depth, 0): check_lm(lm, f"models_by_depth[{depth}]")
        for depth, lm in pairs
        if lm is not None
    }


def check_tips(tips: str | Sequence[str] | None) -> str | None:
    """Tips as one text; several become a list. Raises UsageError."""
    if tips is None:
        return None
    lines = [tips] if isinstance(tips, str) else list(tips)
    if not all(isinstance(line, str) and line.strip() for line in lines):
        raise UsageError(f"tips: expected a text, or a list of texts, got {tips!r}.")
    return (
        "\n".join(line.strip() if isinstance(tips, str) else f"- {line.strip()}" for line in lines)
        or None
    )


def check_prices(options: Options) -> None:
    """A dollar limit over a model of unknown price could not be held. Raises UsageError."""
    if options.budget.usd is None:
        return
    for lm in options.every_lm():
        if lm.price(1000, 1000) is None:
            raise UsageError(
                f"budget.usd: the price of {lm.name!r} is unknown, so a dollar limit cannot be held. "
                "Name the price (--price IN,OUT or --sub-price; in Python price=(IN, OUT); dollars a million tokens), or "
                "limit tokens instead (input_tokens, output_tokens)."
            )
