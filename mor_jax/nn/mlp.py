"""SwiGLU feed-forward (arXiv 2002.05202)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.nn.dense import dense, matrix


@jax.custom_vjp
def swiglu(h_BxTx2xF: jax.Array) -> jax.Array:
    """silu(gate) * up of stacked gate and up.

    Its backward pass is written out: it needs the argument alone, where automatic differentiation keeps the sigmoid,
    its product with gate, and more."""
    return jax.nn.silu(h_BxTx2xF[:, :, 0]) * h_BxTx2xF[:, :, 1]


def _swiglu_bwd(h_BxTx2xF, dy):
    gate, up, dy32 = (x.astype(jnp.float32) for x in (h_BxTx2xF[:, :, 0], h_BxTx2xF[:, :, 1], dy))
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dy32 * up * sigmoid * (1 + gate * (1 - sigmoid))
    return (jnp.stack([dgate, dy32 * gate * sigmoid], axis=2).astype(h_BxTx2xF.dtype),)


swiglu.defvjp(lambda h: (swiglu(h), h), _swiglu_bwd)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix product."""

    mlp_width: int
    init_std: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        width = x_BxTxD.shape[-1]
        gate_up = matrix(self, "gate_up", (2, self.mlp_width, width), (None, "mlp", "embed"), self.init_std)
        down = matrix(self, "down", (width, self.mlp_width), ("embed", "mlp"), self.init_std)
        return dense(swiglu(dense(x_BxTxD, gate_up)), down)
