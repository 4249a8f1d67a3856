"""SwiGLU feed-forward (arXiv 2002.05202)."""

from __future__ import annotations

import flax.linen as nn
import jax

from mor_jax.nn.dense import dense, matrix


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix product."""

    mlp_width: int
    init_std: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        width = x_BxTxD.shape[-1]
        gate_up = matrix(self, "gate_up", (2, self.mlp_width, width), (None, "mlp", "embed"), self.init_std)
        down = matrix(self, "down", (width, self.mlp_width), ("embed", "mlp"), self.init_std)
        h_BxTx2xF = dense(x_BxTxD, gate_up)
        return dense(jax.nn.silu(h_BxTx2xF[:, :, 0]) * h_BxTx2xF[:, :, 1], down)
