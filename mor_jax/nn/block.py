"""Pre-norm Llama block: x + attn(norm(x)), then + mlp(norm(.)). No biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.nn.dense import dense, matrix
from mor_jax.nn.mlp import Mlp
from mor_jax.nn.norm import RMSNorm
from mor_jax.nn.rope import apply_rope

# attend(q_BxKxGxTxH, k_BxKxTxH, v_BxKxTxH) -> (o_BxKxGxTxH, extra). Who attends to what, and where keys and
# values are kept, is the caller's: a training row, a prefill or one decode step are three such functions.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nn.Module):
    """Grouped-query attention projections; queries, keys and values are one matrix product.

    The fused weight is grouped by kv head (its G query heads, then its key and value), so it can be sharded over
    kv heads without cutting through a group.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        heads, kv_heads, head_dim = self.config.dims
        groups, width, std = heads // kv_heads, self.config.width, self.config.init_std
        qkv = matrix(self, "qkv", (kv_heads, groups + 2, head_dim, width), ("kv_heads", None, "head_out", "embed"), std)
        out = matrix(self, "out", (width, kv_heads, groups, head_dim), ("embed", "kv_heads", None, "head_out"), std)
        h_BxKxExTxH = jnp.moveaxis(dense(x_BxTxD, qkv), 1, 3)
        q = apply_rope(h_BxKxExTxH[:, :, :groups], *rope)
        k = apply_rope(h_BxKxExTxH[:, :, groups], *rope)
        o_BxKxGxTxH, extra = attend(q, k, h_BxKxExTxH[:, :, groups + 1])
        return dense(jnp.moveaxis(o_BxKxGxTxH, 3, 1), out, contract=3), extra


class Block(nn.Module):
    """One Transformer block, residuals included. Returns (y_BxTxD, what `attend` returned beside its output)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        c = self.config
        a, extra = Attention(c, name="attention")(RMSNorm(c.norm_eps, name="norm_1")(x_BxTxD), rope, attend)
        x = x_BxTxD + a
        return x + Mlp(c.mlp_width, c.init_std, name="mlp")(RMSNorm(c.norm_eps, name="norm_2")(x)), extra
