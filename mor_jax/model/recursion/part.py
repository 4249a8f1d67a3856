"""A knob's value that has parameters: how they begin, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.nn.parameters import Tree

Init = Callable[[jax.Array, int, int], Any]  # (key, width, recursions) -> parameters


def nothing(key: jax.Array, width: int, recursions: int) -> Tree:
    """No parameters."""
    return {}


class Part(NamedTuple):
    """One value of a knob. `apply`'s arguments are said by the knob's file; the first are its
    parameters.

    Leaves that are called "scale" or "bias" have no weight decay."""

    apply: Callable[..., jax.Array]
    init: Init = nothing


def spread(value: jax.Array, like: jax.Array) -> jax.Array:
    """[D] or [B, D] with axes put in to go with [B, T, D]."""
    return value if value.ndim == 1 else value[:, None].astype(like.dtype)


def of_rows(step: jax.Array | int) -> jax.Array:
    """A step number of all rows, or [B] of each, as float32 with an axis for the width."""
    return jnp.asarray(step, jnp.float32)[..., None]
