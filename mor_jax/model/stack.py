"""The blocks of one part as a loop: `jax.lax.scan` over weights that are stacked in the program.

A program then holds one block a part and pass, however many layers there are, which is what makes
large models compile in minutes. Parameters stay as `LM.init` returns them, one subtree a block, and
so do checkpoints: the axis of blocks exists in the step alone. Unrolled blocks
(`model.block.blocks`) are the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.model.block import ApplyBlock, Attend, EachBlock
from mor_jax.nn.parameters import Tree

# blocks of a part from which on "auto" makes a loop of them; two or three compile as fast unrolled
FROM = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """Parameters of the blocks of a part, each leaf with an axis of blocks before its own."""

    leaves: Tree


def in_loop(choice: str, blocks: int, backend: str, alike: bool) -> bool:
    """Whether a part of so many blocks is a loop.

    Args:
      choice: `model.scan_layers`.
      backend: that is compiled for. "auto" takes loops on TPUs alone: XLA for CPUs copies each
        slice of the stacked weights, and unrolled steps are faster there.
      alike: whether its blocks have the same parameters and are all used at every step (see
        `model.recursion_encoding` and `Program.networks`); others stay unrolled.
    """
    if choice == "on":
        return blocks > 1 and alike
    return choice == "auto" and backend == "tpu" and blocks >= FROM and alike


def stacked(blocks: Mapping[str, Tree]) -> Stack:
    """The parameters of the blocks "0", "1", ..., which must have the same leaves."""
    trees = [blocks[str(i)] for i in range(len(blocks))]
    return Stack(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))


def run_stack(
    one: ApplyBlock, params: Stack, x: jax.Array, attend: Attend | EachBlock, repeat: int = 1
) -> tuple[jax.Array, list[Any]]:
    """As `model.block.blocks`. What attention returned beside its output is a list of `repeat`
    items, each with an axis of blocks before its own; `EachBlock.kept` is such a list."""
    kept: list[Any] = [()] * repeat if callable(attend) else list(attend.kept)

    def block(x: jax.Array, of_block: tuple[Tree, list[Any]]) -> tuple[jax.Array, list[Any]]:
        params, kept = of_block
        extras = []
        for mine in kept:
            x, extra = one(params, x, attend if callable(attend) else attend.make(mine))
            extras.append(extra)
        return x, extras

    return jax.lax.scan(block, x, (params.leaves, kept))
