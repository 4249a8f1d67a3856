"""The one matrix product of the network."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> jax.Array:
    """A float32 parameter drawn from N(0, std), annotated with logical axes."""
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return module.param(name, init, shape, jnp.float32)


def dense(x: jax.Array, w: jax.Array, contract: int = 1) -> jax.Array:
    """x [B, T, in...] times w [out..., in...] -> [B, T, out...], over the last `contract` axes, in the dtype of x.

    Written as a product of two plain matrices, tokens by features: with the axes left apart, XLA on CPUs runs the
    weight gradient at two thirds of the speed. Only when the weight is split over devices do its axes stay apart,
    since flattening across a sharded axis would gather it.
    """
    w = w.astype(x.dtype)
    out, inner = w.shape[: w.ndim - contract], math.prod(w.shape[w.ndim - contract :])
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape.get("tensor", 1) > 1:
        axes = tuple(range(2, 2 + contract)), tuple(range(w.ndim - contract, w.ndim))
        return jax.lax.dot_general(x, w, (axes, ((), ())))
    y = x.reshape(-1, inner) @ w.reshape(-1, inner).T
    return y.reshape(*x.shape[:2], *out)
