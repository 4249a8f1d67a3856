"""A recursive model from the weights of another one, unshared or recursive.

Each shared block is filled from blocks of the source (paper 2.1 and appendix; released choices):
`stepwise` picks them at equal intervals, the first and the last included; `average` takes the mean
of all source blocks that the sharing scheme ties into one; `lower` and `upper` take the first or
the last ones; `random` draws them, in order of depth. Blocks before and after the recursion are the
source's first and last. Embedding, head and final norm are copied; routers are left to the caller's
fresh initialisation. Layers of a recursive source are those it unrolls to. `keep` makes the
target's core the source's: with more or fewer recursions, or a router, but the same blocks.

`source_table` is the whole rule as data; `convert` only carries it out.

Of a relaxed target (`model/lm.py`), "zero" leaves what recursions have of their own where a fresh
model has it, and the model is the tied one; "svd" makes each recursion of the layer it stands for
(`model/relax.py`).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.errors import ConfigError
from mor_jax.model.program import Program, build_program, unrolled_blocks
from mor_jax.model.relax import check_relaxation, relaxed
from mor_jax.nn.parameters import Tree

METHODS = ("stepwise", "average", "lower", "upper", "random", "keep")
PARTS = ("prelude", "core", "coda")
# Fields of the configuration that two models with the same weights may differ in: how blocks are
# shared, and how the model is executed. Another value of any other field makes the weights another
# function, or does not fit them.
FREE = (
    "layers",
    "recursions",
    "sharing",
    "prelude",
    "coda",
    "norms",
    "lora_rank",
    "recursion_encoding",
    "context",
    "init_std",
    "dtype",
    "remat",
    "attention",
    "loss_chunk",
    "scan_layers",
)


def source_table(
    from_model: ModelConfig, to_model: ModelConfig, method: str, *, seed: int = 0
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Which layers of the source (0 = first, unrolled) each block of the target is the mean of.

    Returns:
      {"prelude": ..., "core": ..., "coda": ...}, one tuple of source layers a block; all but
      `average` give one layer.
    Raises:
      ConfigError: an unknown method, fewer source layers than blocks to fill, or, of `keep`,
        another core.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}.")
    source, target = build_program(from_model), build_program(to_model)
    if method == "keep":
        return _kept(source, target)
    layers = source.unrolled_layers
    inner = layers - target.prelude - target.coda  # source layers that the recursion stands for
    if inner < target.core:
        raise ConfigError(
            f"the source has {layers} layers, too few for the {target.unique_layers} blocks of the target "
            f"({target.prelude} before, {target.core} in, {target.coda} after the recursion). Use a source of at least "
            f"{target.unique_layers} layers, or more recursions."
        )
    picks = _core(
        inner, target.core, method, first=target.prelude, in_place=target.repeat > 1, seed=seed
    )
    return {
        "prelude": tuple((i,) for i in range(target.prelude)),
        "core": tuple(tuple(target.prelude + i for i in pick) for pick in picks),
        "coda": tuple((i,) for i in range(layers - target.coda, layers)),
    }


def default_method(from_model: ModelConfig) -> str:
    """`keep` for a source that shares blocks, else `stepwise`."""
    source = build_program(from_model)
    return "stepwise" if source.unique_layers == source.unrolled_layers else "keep"


def _kept(source: Program, target: Program) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The table of `keep`: each block once, from the first layer that is made of it."""

    def blocks(p: Program) -> tuple[int, int, int]:
        return (p.prelude, p.core, p.coda)

    if blocks(source) != blocks(target):
        raise ConfigError(
            f"method 'keep' needs the source's blocks: {' + '.join(map(str, blocks(source)))} there (before, in and after "
            f"the recursion), {' + '.join(map(str, blocks(target)))} here. Set config.model.layers, prelude and coda so "
            "that they are equal, or choose another method."
        )
    layers = source.unrolled_layers
    return {
        "prelude": tuple((i,) for i in range(source.prelude)),
        "core": tuple((source.prelude + i * source.repeat,) for i in range(source.core)),
        "coda": tuple((i,) for i in range(layers - source.coda, layers)),
    }


def _core(
    inner: int, blocks: int, method: str, *, first: int, in_place: bool, seed: int
) -> list[tuple[int, ...]]:
    """Of `inner` source layers, of which the source's layer `first` is number 0, those that each of
    the shared `blocks` is made of."""
    if method == "average":
        # What is tied in the target is averaged: layer l belongs to block l mod b, or, repeated in
        # place, to the l-th of b equal runs. A source of another length than the unrolled target is
        # cut the same way.
        tied = (lambda i: i * blocks // inner) if in_place else (lambda i: i % blocks)
        return [tuple(i for i in range(inner) if tied(i) == block) for block in range(blocks)]
    if method == "stepwise":
        # The released rule: torch.linspace over the source's layers, rounded half to even.
        picks = np.round(np.linspace(first, first + inner - 1, blocks)).astype(int) - first
        return [(int(i),) for i in picks]
    if method == "lower":
        return [(i,) for i in range(blocks)]
    if method == "upper":
        return [(inner - blocks + i,) for i in range(blocks)]
    return [(i,) for i in sorted(random.Random(seed).sample(range(inner), blocks))]


def convert(
    params: Mapping[str, Any],
    from_model: ModelConfig,
    to_model: ModelConfig,
    method: str,
    *,
    seed: int = 0,
    relaxation: str = "zero",
) -> dict[str, Any]:
    """Parameters of the target that have a counterpart: `LM(to_model, depth).init`'s tree less
    `router`, and less what a relaxed target leaves to its own initialisation (`overlay` puts the
    two together).

    Args:
      params: of a model of shape `from_model`.
      seed: of the method `random`.
      relaxation: zero | svd.
    Raises:
      ConfigError: shapes that differ, or see `source_table` and `relax.check_relaxation`.
    """
    check_fit(from_model, to_model)
    check_relaxation(from_model, to_model, relaxation)
    _check_own(from_model, to_model, method)
    table = source_table(from_model, to_model, method, seed=seed)
    layers = [params[part][i] for part, i in unrolled_blocks(build_program(from_model))]

    def fill(picks: Sequence[Sequence[int]]) -> Tree:
        return {str(i): _mean([layers[j] for j in pick]) for i, pick in enumerate(picks)}

    made = {name: params[name] for name in ("embed", "norm", "head") if name in params}
    made |= {part: fill(table[part]) for part in PARTS}
    if from_model.relaxed:  # `_check_own`: so is the target
        made["core"] = {
            i: _of_recursions(block, to_model.recursions) for i, block in made["core"].items()
        }
    elif to_model.relaxed:
        program = build_program(to_model)
        for i, shared in made["core"].items():
            # the layer recursion r stands for
            def own(r: int, i: int = int(i)) -> Tree:
                return layers[program.prelude + r * program.core + i]

            theirs = [own(r) for r in range(program.recursions)] if relaxation == "svd" else None
            made["core"][i] = relaxed(shared, theirs, to_model)
    return made


def _check_own(from_model: ModelConfig, to_model: ModelConfig, method: str) -> None:
    """Raise ConfigError where what recursions of the source have of their own has no place in the
    target."""

    def own(m: ModelConfig) -> tuple[object, ...]:
        return (m.norms, m.lora_rank, m.recursion_encoding)

    if from_model.relaxed and (method != "keep" or own(from_model) != own(to_model)):
        raise ConfigError(
            "recursions of the source have something of their own (config.model.norms, lora_rank, recursion_encoding = "
            f"{own(from_model)}); only method 'keep' into a target with the same values ({own(to_model)} here) has a place "
            "for it."
        )


def _of_recursions(block: Mapping[str, Any], recursions: int) -> dict[str, Any]:
    """A relaxed block for another number of recursions: further ones have what the last one has."""

    def place(leaf: jax.Array) -> jax.Array:
        return leaf[np.minimum(np.arange(recursions), leaf.shape[0] - 1)]

    return dict(block) | {"own": jax.tree.map(place, block["own"])}


def overlay(fresh: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """`made` where it has something, `fresh` elsewhere; both nested dicts."""

    def both(old: Any, new: Any) -> Any:
        return overlay(old, new) if isinstance(new, Mapping) else new

    return {name: both(old, made[name]) if name in made else old for name, old in fresh.items()}


def check_fit(from_model: ModelConfig, to_model: ModelConfig) -> None:
    """Raise ConfigError unless a block of one model can be a block of the other, computing the
    same."""
    old, new = (dataclasses.asdict(m) | {"head_dim": m.dims[2]} for m in (from_model, to_model))
    wrong = [
        f"{name} {old[name]} there, {new[name]} here"
        for name in old
        if name not in FREE and not _same(old[name], new[name])
    ]
    if wrong:
        raise ConfigError(
            f"the source's weights do not fit config.model: {'; '.join(wrong)}. Only layers, sharing, recursions, "
            "prelude, coda and what concerns the execution may differ."
        )


def _same(a: object, b: object) -> bool:
    """Floats up to the rounding of float32, in which other formats keep them."""
    return (
        math.isclose(a, b, rel_tol=1e-6)
        if isinstance(a, float) and isinstance(b, float)
        else a == b
    )


def _mean(blocks: list[Any]) -> Any:
    if len(blocks) == 1:  # the very arrays: no rounding
        return blocks[0]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *blocks)
