"""Routers: scores of a token from its raw hidden state, in float32 (no norm, no bias: paper A.2).

"linear" is D -> n; "mlp" D -> 2D -> GELU (exact, not the tanh form) -> n; "wide_mlp" has 4D hidden
units, as the paper says (the released code builds the 2D one under both names).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.nn.parameters import matrix

HIDDEN = {"linear": 0, "mlp": 2, "wide_mlp": 4}


def router_size(kind: str, width: int, outputs: int) -> int:
    """Parameters of a router over states of this width."""
    hidden = HIDDEN[kind] * width
    return hidden * (width + outputs) if hidden else width * outputs


class Router(nn.Module):
    """[B, T, D] -> [B, T, outputs], float32 whatever the compute dtype."""

    kind: str
    outputs: int
    init_std: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        width, hidden = x_BxTxD.shape[-1], HIDDEN[self.kind] * x_BxTxD.shape[-1]
        h = x_BxTxD.astype(jnp.float32)
        if hidden:
            w_FxD = matrix(self, "hidden", (hidden, width), (None, "norm"), self.init_std)
            h = jax.nn.gelu(jnp.einsum("BTD,FD->BTF", h, w_FxD), approximate=False)
        kernel = matrix(self, "kernel", (self.outputs, h.shape[-1]), (None, "norm"), self.init_std)
        return jnp.einsum("BTF,NF->BTN", h, kernel)
