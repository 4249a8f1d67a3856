"""The program: which block runs when, as static data.

    x -> prelude (own weights) -> core x R (shared weights) -> coda (own weights)

The sharing schemes of the paper (table 1) are settings of it. `cycle` repeats the whole core,
(012)(012)(012); `sequence` repeats each block in place, (000)(111)(222); their `middle_` forms keep
the first and the last layer unique, and `model.prelude`, `model.coda` set any other number of own
blocks. A plain Transformer is R = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mor_jax.config import ModelConfig, unshared_ends


@dataclass(frozen=True)
class Program:
    """Block counts of each part, and how the core is repeated."""

    prelude: int
    core: int  # of one application
    coda: int
    recursions: int  # times the whole core is applied: the steps a depth policy decides about
    repeat: int = 1  # times each of its blocks runs in place within one application
    networks: int = 1  # cores with weights of their own, of which each step applies one

    @property
    def unique_layers(self) -> int:
        """Blocks with weights of their own."""
        return self.prelude + self.core * self.networks + self.coda

    @property
    def unrolled_layers(self) -> int:
        """Block applications a token of full depth goes through."""
        return self.prelude + self.core * self.recursions * self.repeat + self.coda


def build_program(model: ModelConfig) -> Program:
    """The program of a checked model configuration (`config.check` refuses layer counts that do not
    divide)."""
    prelude, coda = unshared_ends(model)
    in_place = model.sharing.endswith("sequence")
    return Program(
        prelude=prelude,
        core=(model.layers - prelude - coda) // model.recursions,
        coda=coda,
        recursions=1 if in_place else model.recursions,
        repeat=model.recursions if in_place else 1,
        networks=model.networks,
    )


def unrolled_blocks(program: Program) -> list[tuple[str, str]]:
    """The block of every layer a token of full depth goes through: its part and number, as
    parameters are named."""
    core = [("core", str(i)) for i in range(program.core) for _ in range(program.repeat)]
    return [
        *(("prelude", str(i)) for i in range(program.prelude)),
        *core * program.recursions,
        *(("coda", str(i)) for i in range(program.coda)),
    ]


def tiled(shares: tuple[float, ...], length: int, tile: int) -> tuple[float, ...]:
    """Shares whose counts in a row of `length` are the nearest multiples of `tile` (at least one,
    at most the row)."""
    if tile == 1:
        return shares
    counts = [min(length, max(1, round(k / tile)) * tile) for k in active_counts(shares, length)]
    # just above, so that the floor below is k
    return tuple(min(1.0, (k + 1e-6) / length) for k in counts)


def active_counts(shares: tuple[float, ...], length: int) -> tuple[int, ...]:
    """Tokens of a row of `length` at these shares: max(1, floor(c T)), as in the released code."""
    return tuple(max(1, math.floor(c * length)) for c in shares)
