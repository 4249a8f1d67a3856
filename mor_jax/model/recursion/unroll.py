"""The steps in training: how many, and how far back the gradient goes.

Rows may run different numbers of steps. They are aligned at the end: a row that runs fewer waits,
so the last steps of all rows are the same ones, and those have the gradient (truncated
backpropagation, Huginn, arXiv 2502.05171). Steps before them are a loop whose length is a value: a
short draw costs less. Each step knows a row's own number for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.config import RecursionConfig
from mor_jax.model.recurse import HIDDEN, Core
from mor_jax.model.recursion import solver
from mor_jax.model.recursion.adjoint import attached


class Unrolled(NamedTuple):
    """S is the number of steps that have a gradient."""

    h_BxTxD: jax.Array
    states_SxBxTxD: jax.Array | None  # after each of them, if asked for
    index_SxB: jax.Array  # a row's own number of each from 0, negative before its first
    steps_B: jax.Array  # that each row ran


def run_unrolled(
    make_core: Callable[[Any, jax.Array], Core],
    params: Any,
    h_BxTxD: jax.Array,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    seg_BxT: jax.Array,
    *,
    most: int,
    window: int,
    steps_B: jax.Array | None,
    keep: bool,
    segments: int = 1,
    first: jax.Array | int = 0,
) -> Unrolled:
    """All tokens through the steps of their row; padding stays as it is and is nobody's key.

    Args:
      make_core: (params, e) -> `Loop.around`'s core.
      most: steps at most; without `steps_B`, of every row.
      window: steps at the end that have a gradient; 0: all.
      steps_B: int32 in 1..most.
      keep: return the state after each step that has a gradient.
      first: number of the first step.
      segments: equal parts of the steps. No gradient crosses from one to the next, `window` is of
        each, and what is kept is the state after each, its number from 0 the index.
    """
    if segments > 1:
        return _run_segments(
            make_core,
            params,
            h_BxTxD,
            e_BxTxD,
            pos_BxT,
            seg_BxT,
            most=most,
            window=window,
            segments=segments,
        )
    window = min(window or most, most)
    rows = h_BxTxD.shape[0]
    total = most if steps_B is None else jnp.max(steps_B)
    free = total - window  # before the gradient begins; where steps are drawn, it may be negative

    def step(core: Core, h: jax.Array, j: jax.Array) -> jax.Array:
        index = first + j if steps_B is None else j - (total - steps_B)  # of all rows, or [B]
        active_BxT = (seg_BxT > 0) & (index >= 0 if steps_B is None else (index >= 0)[:, None])
        y, _ = core(
            h,
            pos_BxT,
            seg_BxT,
            jnp.where(active_BxT, seg_BxT, HIDDEN),
            recursion=jnp.maximum(index, 0),
        )
        return jnp.where(active_BxT[..., None], y, h)

    h = h_BxTxD
    if window < most:
        still = jax.lax.stop_gradient
        frozen = make_core(still(params), still(e_BxTxD))
        ran = jax.lax.fori_loop(0, jnp.maximum(free, 0), lambda j, h: step(frozen, h, j), still(h))
        h = jnp.where(free > 0, ran, h)
    core = make_core(params, e_BxTxD)

    def one(h: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        j = free + i

        def run(h: jax.Array) -> jax.Array:
            return step(core, h, j)

        # until a row has begun: nothing
        h = run(h) if steps_B is None else jax.lax.cond(j >= 0, run, lambda h: h, h)
        return h, h if keep else None

    h, states = jax.lax.scan(one, h, jnp.arange(window))
    ran_B = jnp.full((rows,), most, jnp.int32) if steps_B is None else steps_B
    index_SxB = free + jnp.arange(window)[:, None] - (total - ran_B)
    return Unrolled(h, states, index_SxB, ran_B)


def _run_segments(
    make_core: Callable[[Any, jax.Array], Core],
    params: Any,
    h_BxTxD: jax.Array,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    seg_BxT: jax.Array,
    *,
    most: int,
    window: int,
    segments: int,
) -> Unrolled:
    """Deep supervision (HRM, arXiv 2506.21734; TRM, arXiv 2510.04871)."""
    calls = most // segments

    def one(h: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = run_unrolled(
            make_core,
            params,
            jax.lax.stop_gradient(h),
            e_BxTxD,
            pos_BxT,
            seg_BxT,
            most=calls,
            window=window,
            steps_B=None,
            keep=False,
            first=i * calls,
        )
        return out.h_BxTxD, out.h_BxTxD

    h, states = jax.lax.scan(one, h_BxTxD, jnp.arange(segments))
    rows = h.shape[0]
    index_SxB = jnp.broadcast_to(jnp.arange(segments)[:, None], (segments, rows))
    return Unrolled(h, states, index_SxB, jnp.full((rows,), most, jnp.int32))


def run_to_rest(
    make_core: Callable[[Any, jax.Array], Core],
    params: Any,
    h_BxTxD: jax.Array,
    e_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    seg_BxT: jax.Array,
    *,
    most: int,
    config: RecursionConfig,
) -> Unrolled:
    """To a fixed point of the step, in at most `most` steps without a gradient; then once more,
    with that of the fixed point (`adjoint.attached`). Arguments as in `run_unrolled`."""

    def f(learned: Any, rest: Any, z: jax.Array) -> jax.Array:
        pos, seg = rest
        y, _ = make_core(*learned)(z, pos, seg, jnp.where(seg > 0, seg, HIDDEN), recursion=0)
        return jnp.where((seg > 0)[..., None], y, z)

    still, rest = jax.lax.stop_gradient, (pos_BxT, seg_BxT)
    learned = params, e_BxTxD
    frozen = functools.partial(f, still(learned), rest)
    solve = solver.CHOICES[config.solver]
    assert solve is not None, "called where one is configured"
    found = solve(frozen, still(h_BxTxD), most, config.tolerance)
    h = attached(f, config, learned, rest, still(found.z))
    steps_B = jnp.broadcast_to(found.steps, h.shape[:1])
    return Unrolled(h, None, steps_B[None] - 1, steps_B)
