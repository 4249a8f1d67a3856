"""Token embedding; the same table is the output head (tied)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.nn.dense import matrix


class Embedding(nn.Module):
    """Rows of a [V, D] table in the compute dtype."""

    vocab_size: int
    width: int
    init_std: float
    dtype: str

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        table_VxD = matrix(self, "table", (self.vocab_size, self.width), ("vocab", "table_embed"), self.init_std)
        return jnp.take(table_VxD, tokens_BxT, axis=0).astype(self.dtype)
