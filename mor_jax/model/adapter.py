"""Low-rank adapters (LoRA, arXiv 2106.09685): what a fine-tuning run trains in place of the
weights.

Of each chosen matrix W of a block, W + alpha / rank * (adapter_up @ adapter_down) takes its place.
All matrices of a block name their outputs first and their inputs last, so both halves contract over
the rank. A shared core has one adapter, used wherever the core is. They have nothing to do with
`model.lora_rank`, the additions that each recursion has for its own, which are weights like any
other: those stay as they are while adapters are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mor_jax.config import AdapterConfig
from mor_jax.model.lm import LM
from mor_jax.nn.parameters import Tree
from mor_jax.parallel.rules import Rules

T = TypeVar("T")

DOWN, UP = "adapter_down", "adapter_up"
INPUTS = {"qkv": 1, "out": 3, "gate_up": 1, "down": 1}  # last axes of a matrix that are inputs
PARTS = ("prelude", "core", "coda")


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model, with the functions of an `LM` that a training state is made of."""

    lm: LM
    config: AdapterConfig

    @property
    def rules(self) -> Rules:
        return self.lm.rules

    def _each(self, make: Callable[[str, Any], Tree], tree: Tree) -> Tree:
        """{part: {block: {attention|mlp: {name: make(name, leaf)}}}} over the chosen matrices of a
        tree like `lm`'s."""

        def chosen(leaves: Tree) -> Tree:
            return {
                name: make(name, x) for name, x in leaves.items() if name in self.config.targets
            }

        def block(b: Tree) -> Tree:
            return {group: made for group in ("attention", "mlp") if (made := chosen(b[group]))}

        return {part: {i: block(b) for i, b in tree[part].items()} for part in PARTS if tree[part]}

    def init(self, key: jax.Array) -> Tree:
        """Adapters that change nothing: `adapter_up` is zero, `adapter_down` is drawn."""
        count = iter(range(1_000_000))

        def make(name: str, shape: jax.ShapeDtypeStruct) -> dict[str, jax.Array]:
            out, into = _split(name, shape.shape)
            std = 1 / math.sqrt(math.prod(into))
            down = std * jax.random.normal(
                jax.random.fold_in(key, next(count)), (self.config.rank, *into), jnp.float32
            )
            return {DOWN: down, UP: jnp.zeros((*out, self.config.rank), jnp.float32)}

        return self._each(make, jax.eval_shape(self.lm.init, key))

    def logical_axes(self) -> Tree:
        """Tree like `init`'s; the halves lie as the sides of their matrix do."""

        def make(name: str, axes: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
            out, into = _split(name, axes)
            return {DOWN: (None, *into), UP: (*out, None)}

        return self._each(make, self.lm.logical_axes())

    def merged(self, params: Tree, adapters: Tree) -> Tree:
        """The parameters with the adapters in them, a tree like `params`."""
        scale = self.config.alpha / self.config.rank

        def put(old: Any, new: Any) -> Any:
            if DOWN in new:
                return old + scale * jnp.tensordot(new[UP], new[DOWN], axes=1)
            return {
                name: put(leaf, new[name]) if name in new else leaf for name, leaf in old.items()
            }

        return put(params, adapters)


def _split(name: str, axes: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """(outputs, inputs) among what stands for the axes of a matrix."""
    cut = len(axes) - INPUTS[name]
    return axes[:cut], axes[cut:]
