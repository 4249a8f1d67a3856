"""The activation of a SwiGLU feed-forward (arXiv 2002.05202)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(h: jax.Array) -> jax.Array:
    """silu(gate) * up of gate and up stacked, [..., 2, F] -> [..., F].

    Its backward pass is written out: it needs the argument alone, where automatic differentiation
    keeps the sigmoid, its product with gate, and more."""
    return jax.nn.silu(h[..., 0, :]) * h[..., 1, :]


def _swiglu_bwd(h: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    gate, up, dy32 = (x.astype(jnp.float32) for x in (h[..., 0, :], h[..., 1, :], dy))
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dy32 * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (jnp.stack([dgate, dy32 * gate * sigmoid], axis=-2).astype(h.dtype),)


swiglu.defvjp(lambda h: (swiglu(h), h), _swiglu_bwd)
