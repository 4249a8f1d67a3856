"""The gradient at a fixed point z* = f(z*): of the loss's gradient g it takes u = g + J^T u, with J
the derivative of f at z*, back through one application of f. Memory does not grow with the steps.

neumann: u = g + J^T g + ... + (J^T)^k g. k = 0 is the one-step gradient (HRM, arXiv 2506.21734), 1
that of Attractor models (arXiv 2605.12466). anderson: u itself, to the tolerance (implicit
differentiation, arXiv 1909.01377).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.config import RecursionConfig
from mor_jax.model.recursion.solver import anderson

Pull = Callable[[jax.Array], jax.Array]  # u -> J^T u
Step = Callable[[Any, Any, jax.Array], jax.Array]  # f(learned, rest, z)


def _neumann(pull: Pull, g: jax.Array, config: RecursionConfig) -> jax.Array:
    return jax.lax.fori_loop(0, config.adjoint_steps, lambda _, u: g + pull(u), g)


def _anderson(pull: Pull, g: jax.Array, config: RecursionConfig) -> jax.Array:
    return anderson(lambda u: g + pull(u), g, config.adjoint_steps, config.tolerance).z


# (pull, g, config) -> u
CHOICES = {"neumann": _neumann, "anderson": _anderson}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attached(f: Step, config: RecursionConfig, learned: Any, rest: Any, z: jax.Array) -> jax.Array:
    """f(learned, rest, z) of a fixed point z, with the gradient of the fixed point for `learned`
    and none for z. `rest`: arrays without a gradient."""
    return f(learned, rest, z)


def _forward(
    f: Step, config: RecursionConfig, learned: Any, rest: Any, z: jax.Array
) -> tuple[jax.Array, Any]:
    return f(learned, rest, z), (learned, rest, z)


def _backward(f: Step, config: RecursionConfig, kept: Any, g: jax.Array) -> tuple[Any, ...]:
    learned, rest, z = kept
    _, pull = jax.vjp(lambda learned, z: f(learned, rest, z), learned, z)
    u = CHOICES[config.adjoint](lambda u: pull(u)[1], g, config)
    return pull(u)[0], None, jnp.zeros_like(z)


attached.defvjp(_forward, _backward)
