"""Rotary position embedding (arXiv 2104.09864), half-split layout as in Llama."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_table(pos: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos, sin of shape [..., head_dim / 2] in float32 for integer positions, [B, T] or [M] (original ones: a gathered
    token keeps the position it had in its document)."""
    inverse_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = pos[..., None].astype(jnp.float32) * inverse_freq
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, heads..., T, H] by tables [B, T, H / 2], or x [M, heads..., H] by tables [M, H / 2]. The tables are
    broadcast over the head axes. Computed in float32, in the dtype of x."""
    heads = x.ndim - cos.ndim
    expand = lambda t: t.reshape(t.shape[0], *(1,) * heads, *t.shape[1:])
    cos, sin = expand(cos), expand(sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
