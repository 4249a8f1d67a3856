"""The one matrix product of the network."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def matrix(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> jax.Array:
    """A float32 parameter drawn from N(0, std), annotated with logical axes."""
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return module.param(name, init, shape, jnp.float32)


def dense(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum(spec, x, w) in the dtype of `x`; weights are stored output-major and cast on the way."""
    return jnp.einsum(spec, x, w.astype(x.dtype))
