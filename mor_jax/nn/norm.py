"""RMSNorm (arXiv 1910.07467), computed in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Residuals = tuple[jax.Array, jax.Array, jax.Array]  # x, scale, 1 / rms(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, in the dtype of `x`. `scale`: [D], or [B, 1, D] of
    each row its own (not to be differentiated).

    Its backward pass is written out: of what it needs, only x and one number a row are kept, where
    automatic differentiation keeps up to four arrays of the size of x."""
    return _rms_norm_fwd(x, scale, eps)[0]


def _rms_norm_fwd(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, Residuals]:
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * scale).astype(x.dtype), (x, scale, inverse_rms)


def _rms_norm_bwd(eps: float, residuals: Residuals, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale, inverse_rms = residuals
    unit, dy32 = x.astype(jnp.float32) * inverse_rms, dy.astype(jnp.float32)
    dscale = jnp.sum(dy32 * unit, axis=tuple(range(x.ndim - 1)))
    dunit = dy32 * scale
    dx = inverse_rms * (dunit - unit * jnp.mean(dunit * unit, axis=-1, keepdims=True))
    return dx.astype(x.dtype), dscale


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)
