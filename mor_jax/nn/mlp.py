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
        h_2xBxTxF = dense("BTD,eFD->eBTF", x_BxTxD, gate_up)
        return dense("BTF,DF->BTD", jax.nn.silu(h_2xBxTxF[0]) * h_2xBxTxF[1], down)
