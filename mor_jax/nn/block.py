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
# values are kept, is the caller's: a training row, a prefill or one decode step are three such functions. Where a
# block projects queries only, k and v are None.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Attention(nn.Module):
    """Grouped-query attention projections; queries, keys and values are one matrix product.

    The fused weight is grouped by kv head (its G query heads, then its key and value), so it can be sharded over
    kv heads without cutting through a group. `queries_only` multiplies by the query part of it alone.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, queries_only: bool = False
    ) -> tuple[jax.Array, Any]:
        heads, kv_heads, head_dim = self.config.dims
        groups, width, std = heads // kv_heads, self.config.width, self.config.init_std
        qkv = matrix(self, "qkv", (kv_heads, groups + 2, head_dim, width), ("kv_heads", None, "head_out", "embed"), std)
        out = matrix(self, "out", (width, kv_heads, groups, head_dim), ("embed", "kv_heads", None, "head_out"), std)
        h_BxKxExTxH = jnp.moveaxis(dense(x_BxTxD, qkv[:, :groups] if queries_only else qkv), 1, 3)
        q = apply_rope(h_BxKxExTxH[:, :, :groups], *rope)
        k = v = None
        if not queries_only:
            k, v = apply_rope(h_BxKxExTxH[:, :, groups], *rope), h_BxKxExTxH[:, :, groups + 1]
        o_BxKxGxTxH, extra = attend(q, k, v)
        return dense(jnp.moveaxis(o_BxKxGxTxH, 3, 1), out, contract=3), extra


class Block(nn.Module):
    """One Transformer block, residuals included. Returns (y_BxTxD, what `attend` returned beside its output)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, queries_only: bool = False
    ) -> tuple[jax.Array, Any]:
        c = self.config
        h = RMSNorm(c.norm_eps, name="norm_1")(x_BxTxD)
        a, extra = Attention(c, name="attention")(h, rope, attend, queries_only)
        x = x_BxTxD + a
        return x + Mlp(c.mlp_width, c.init_std, name="mlp")(RMSNorm(c.norm_eps, name="norm_2")(x)), extra
