"""Rotary position embedding (arXiv 2104.09864), half-split layout as in Llama."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rope_table(pos_BxT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos, sin of shape [B, T, head_dim / 2] in float32 for integer positions (original ones: a gathered token
    keeps the position it had in its document)."""
    inverse_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = pos_BxT[..., None].astype(jnp.float32) * inverse_freq
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos_BxTxh: jax.Array, sin_BxTxh: jax.Array) -> jax.Array:
    """Rotate x [B, heads..., T, H]; the table is broadcast over the head axes. Computed in float32."""
    heads = x.ndim - 3
    expand = lambda t: t.reshape(t.shape[0], *(1,) * heads, *t.shape[1:])
    cos, sin = expand(cos_BxTxh), expand(sin_BxTxh)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
