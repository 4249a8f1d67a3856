"""How training finds the fixed point z* = f(z*) of a step, without a gradient (deep equilibrium
models, arXiv 1909.01377).

Both start from z and stop once no token's residual |f(z) - z| / |f(z)| is above the tolerance, or
after `most` steps. They see a token beside its own past alone, so that solving a longer row changes
an earlier token by no more than the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Map = Callable[[jax.Array], jax.Array]  # of states [B, T, D]
HISTORY = 5  # iterates that Anderson's method mixes
RIDGE = 1e-6  # relative to the mean squared residual: the system is nearly singular at the end


class Solved(NamedTuple):
    """`residual`: the largest of any token, of the last step."""

    z: jax.Array
    steps: jax.Array
    residual: jax.Array


def _residual(before: jax.Array, after: jax.Array) -> jax.Array:
    """The largest of any token."""
    change = jnp.linalg.norm((after - before).astype(jnp.float32), axis=-1)
    size = jnp.linalg.norm(after.astype(jnp.float32), axis=-1)
    return jnp.max(change / jnp.maximum(size, 1e-12))


def picard(f: Map, z: jax.Array, most: int, tolerance: float) -> Solved:
    """z <- f(z)."""

    def one(found: Solved) -> Solved:
        new = f(found.z)
        return Solved(new, found.steps + 1, _residual(found.z, new))

    begin = Solved(z, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, jnp.float32))
    return jax.lax.while_loop(lambda s: (s.steps < most) & (s.residual > tolerance), one, begin)


def anderson(f: Map, z: jax.Array, most: int, tolerance: float) -> Solved:
    """Anderson's method with weights of each token: z <- sum a_i f(z_i) over the last iterates,
    where the a_i sum to 1 and make |sum a_i (f(z_i) - z_i)| least."""
    history = min(HISTORY, most)

    def mixed(made: jax.Array, residuals: jax.Array, filled: jax.Array) -> jax.Array:
        gram = jnp.einsum("ibtd,jbtd->btij", residuals, residuals)
        scale = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / history + 1e-30
        both = filled[:, None] & filled[None]
        gram = jnp.where(both, gram / scale, 0.0) + (RIDGE + ~filled) * jnp.eye(history)
        one = filled.astype(jnp.float32)
        a = jnp.linalg.solve(gram, jnp.broadcast_to(one[:, None], (*gram.shape[:-1], 1)))[..., 0]
        a = a / jnp.sum(a, axis=-1, keepdims=True)
        return jnp.einsum("bti,ibtd->btd", a, made)

    Kept = tuple[Solved, jax.Array, jax.Array]

    def one(carry: Kept) -> Kept:
        found, made, residuals = carry
        new, slot = f(found.z), found.steps % history
        made = made.at[slot].set(new.astype(jnp.float32))
        residuals = residuals.at[slot].set((new - found.z).astype(jnp.float32))
        filled = jnp.arange(history) <= found.steps
        left = _residual(found.z, new)
        # at the end the step itself, so that what is returned is f of something
        z = jnp.where(left > tolerance, mixed(made, residuals, filled).astype(z_dtype), new)
        return Solved(z, found.steps + 1, left), made, residuals

    z_dtype, empty = z.dtype, jnp.zeros((history, *z.shape), jnp.float32)
    begin = Solved(z, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, jnp.float32))

    def goes_on(carry: Kept) -> jax.Array:
        return (carry[0].steps < most) & (carry[0].residual > tolerance)

    return jax.lax.while_loop(goes_on, one, (begin, empty, empty))[0]


CHOICES = {"none": None, "picard": picard, "anderson": anderson}
