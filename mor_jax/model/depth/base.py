"""What a depth policy is: the small object that decides, token by token, who runs each recursion step.

A policy is a frozen dataclass (hashable, static under jit). Its parameters, if any, are stacked over recursion
steps on the leading axis. The executors in `model/recurse.py` call it; it never sees the blocks.
"""

from __future__ import annotations

from typing import Protocol

import jax


class DepthPolicy(Protocol):
    """Arrays: z [B, T] float32 router scores; candidates, active [B, T] bool; k a token count per row."""

    recursions: int

    def init(self, key: jax.Array) -> dict:
        """Router parameters, every leaf [R, ...]; {} when there are none."""

    def logical_axes(self) -> dict:
        """Logical axis names of `init`'s leaves."""

    def counts(self, length: int) -> tuple[int, ...]:
        """Tokens of a row of `length` that run step r = 1..R in training: static, non-increasing."""

    def score(self, router: dict, h_BxTxD: jax.Array) -> jax.Array:
        """Scores z of one recursion step (`router` is one slice of `init`'s leaves)."""

    def top(self, z_BxT: jax.Array, candidates_BxT: jax.Array, k: jax.Array | int) -> jax.Array:
        """Training selection: mask of the at most k chosen candidates of each row."""

    def continues(self, z_BxT: jax.Array) -> jax.Array:
        """Causal selection: mask of the tokens that would run this step, from their own score alone."""

    def combine(self, h: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        """State after the step of tokens that ran it: h [B, K, D] before, y [B, K, D] the core's output."""

    def aux_loss(self, z: jax.Array, target: jax.Array) -> jax.Array:
        """Per-candidate auxiliary loss of a score against the training selection; same shape as z."""
