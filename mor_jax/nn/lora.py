"""Low-rank additions to the query and value projections (LoRA, arXiv 2106.09685): what a recursion has of its own.

Each is `up @ down`, of rank much below the width; `up` starts at zero, so a fresh model is the tied one. No scale is
put on top: the learning rate is the model's.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.nn.dense import dense, matrix


class Lora(nn.Module):
    """Parameters of one block at one recursion: {query, value}_down [rank, D], query_up [K, G, H, rank], value_up
    [K, H, rank]. `low_rank` applies them."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        heads, kv_heads, head_dim = self.config.dims
        rank, std = self.config.lora_rank, self.config.init_std
        for name, shape in (("query", (kv_heads, heads // kv_heads, head_dim)), ("value", (kv_heads, head_dim))):
            matrix(self, f"{name}_down", (rank, self.config.width), (None, "embed"), std)
            axes = ("kv_heads", *(None,) * (len(shape) - 2), "head_out", None)
            matrix(self, f"{name}_up", (*shape, rank), axes, 0.0)


def low_rank(x_BxTxD: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
    """[B, T, out...] = x down^T up^T. down [rank, D] and up [out..., rank], or of each row of the batch its own, with a
    leading B."""
    if down.ndim == 2:
        return dense(dense(x_BxTxD, down), up)
    hidden = jnp.einsum("BTD,BRD->BTR", x_BxTxD, down.astype(x_BxTxD.dtype))
    out = jnp.einsum("BTR,BOR->BTO", hidden, up.reshape(up.shape[0], -1, up.shape[-1]).astype(x_BxTxD.dtype))
    return out.reshape(*out.shape[:2], *up.shape[1:-1])
