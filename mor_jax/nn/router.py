"""Linear router: one score per token, computed in float32 on the raw hidden state (no norm, no bias: paper A.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.nn.dense import matrix


class LinearRouter(nn.Module):
    """z = x . w, float32 whatever the compute dtype."""

    init_std: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        w_D = matrix(self, "kernel", (x_BxTxD.shape[-1],), ("norm",), self.init_std)
        return jnp.einsum("BTD,D->BT", x_BxTxD.astype(jnp.float32), w_D)
