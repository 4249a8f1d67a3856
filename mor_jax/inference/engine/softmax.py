"""A softmax over keys that come part by part."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30
LN2 = math.log(2)


class Softmax(NamedTuple):
    """A softmax under way: what its exponents are taken off, sum of exponentials, weighted sum of values. All float32.

    `top` is the largest score rounded up to a multiple of ln 2. Which keys came in which part, and what was largest
    among them, then changes weights by powers of two, and a weight that is rounded to bfloat16 before it meets its value
    is rounded the same way everywhere. Off the largest score itself it would be rounded anew in every partition of the
    keys: verification of drafts, prefill and decoding would be so far apart that greedy tokens differ.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Softmax:
        """Before any key, for queries of this shape."""
        zeros = jnp.zeros(shape[:-1], jnp.float32)
        return cls(zeros + MASKED, zeros, jnp.zeros(shape, jnp.float32))

    def add(self, score: jax.Array, mask: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> Softmax:
        """With more keys; `weigh` maps their weights to the sum of their values. What is masked in all of them changes
        nothing, to the last bit."""
        score = jnp.where(mask, score, MASKED)
        top = jnp.maximum(self.top, jnp.ceil(jnp.max(score, axis=-1) / LN2) * LN2)
        weight = jnp.where(mask, jnp.exp(score - top[..., None]), 0.0)
        shrink = jnp.exp(self.top - top)
        total = self.total * shrink + jnp.sum(weight, axis=-1)
        return Softmax(top, total, self.out * shrink[..., None] + weigh(weight))

    def result(self, dtype: str) -> jax.Array:
        """Weighted means of the values; zeros for a query that saw none."""
        return (self.out / jnp.maximum(self.total, 1e-30)[..., None]).astype(dtype)


__all__ = ["Softmax"]
