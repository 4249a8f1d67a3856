"""The program as a line of text: which block runs when, with whose weights.

    embed → [0] → (1 2 … 10) × 3 → [11] → norm → head

Square brackets hold blocks of their own, round ones the shared core. Numbers are unique blocks: a
number that comes again is the same weights again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mor_jax.analysis import units
from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.program import Program, build_program

LONG = 4  # blocks of a part that are still written out one by one


def draw_program(model: ModelConfig) -> str:
    """The program in one line, repetition folded into a factor."""
    p = build_program(model)
    prelude, core, coda = _numbers(p)
    parts = ["embed"]
    if prelude:
        parts.append(f"[{_span(prelude)}]")
    if p.repeat > 1:
        blocks = core if len(core) <= LONG else [core[0], None, core[-1]]
        parts.append(" ".join("…" if b is None else f"({b} × {p.repeat})" for b in blocks))
    elif p.recursions > 1:
        parts.append(f"({_span(core)}) × {p.recursions}")
    else:
        parts.append(f"[{_span(core)}]")
    if coda:
        parts.append(f"[{_span(coda)}]")
    return " → ".join([*parts, "norm", "head"])


def draw_unrolled(model: ModelConfig) -> str:
    """The same, every application in order: `0 (1 2)(1 2)(1 2) 3`."""
    p = build_program(model)
    prelude, core, coda = _numbers(p)
    if p.repeat > 1:
        middle = "".join(f"({' '.join([str(b)] * p.repeat)})" for b in core)
    elif p.recursions > 1:
        middle = f"({' '.join(map(str, core))})" * p.recursions
    else:
        middle = " ".join(map(str, core))
    return " ".join(filter(None, [" ".join(map(str, prelude)), middle, " ".join(map(str, coda))]))


def draw_shares(model: ModelConfig, depth: DepthConfig) -> str:
    """Who runs each recursion in training: `r1 100 % · r2 66.7 % · r3 33.3 %`; "" when nothing is
    routed."""
    if not depth.routed:
        return ""
    return " · ".join(f"r{r} {units.percent(s)}" for r, s in enumerate(depth.shares(model), 1))


def _numbers(p: Program) -> tuple[list[int], list[int], list[int]]:
    blocks = list(range(p.unique_layers))
    return blocks[: p.prelude], blocks[p.prelude : p.prelude + p.core], blocks[p.prelude + p.core :]


def _span(blocks: Sequence[int]) -> str:
    if len(blocks) <= LONG:
        return " ".join(map(str, blocks))
    return f"{blocks[0]} {blocks[1]} … {blocks[-1]}"


def draw_sources(table: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """Where each block of a converted model came from: `block 0 = layer 0 · block 1 = mean of
    layers 1 3 5 · ...`."""
    picks = [pick for part in ("prelude", "core", "coda") for pick in table[part]]

    def of(pick: Sequence[int]) -> str:
        return (
            f"layer {pick[0]}" if len(pick) == 1 else f"mean of layers {' '.join(map(str, pick))}"
        )

    return " · ".join(f"block {i} = {of(pick)}" for i, pick in enumerate(picks))
