"""Pre-norm Llama block: x + attn(norm(x)), then + mlp(norm(.)). No biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.nn.dense import dense, matrix
from mor_jax.nn.lora import low_rank
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
        self, x_BxTxD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, queries_only: bool = False,
        own: dict | None = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        heads, kv_heads, head_dim = self.config.dims
        groups, width, std = heads // kv_heads, self.config.width, self.config.init_std
        qkv = matrix(self, "qkv", (kv_heads, groups + 2, head_dim, width), ("kv_heads", None, "head_out", "embed"), std)
        out = matrix(self, "out", (width, kv_heads, groups, head_dim), ("embed", "kv_heads", None, "head_out"), std)
        h_BxTxKxExH = dense(x_BxTxD, qkv[:, :groups] if queries_only else qkv)
        if own and "lora" in own:
            h_BxTxKxExH += _addition(x_BxTxD, own["lora"], queries_only)
        h_BxKxExTxH = jnp.moveaxis(h_BxTxKxExH, 1, 3)
        q = apply_rope(h_BxKxExTxH[:, :, :groups], *rope)
        k = v = None
        if not queries_only:
            k, v = apply_rope(h_BxKxExTxH[:, :, groups], *rope), h_BxKxExTxH[:, :, groups + 1]
        o_BxKxGxTxH, extra = attend(q, k, v)
        return dense(jnp.moveaxis(o_BxKxGxTxH, 3, 1), out, contract=3), extra


def _addition(x_BxTxD: jax.Array, lora: dict, queries_only: bool) -> jax.Array:
    """What a recursion adds to the fused projection: to its queries and its value, not to its key."""
    query_BxTxKxGxH = low_rank(x_BxTxD, lora["query_down"], lora["query_up"])
    if queries_only:
        return query_BxTxKxGxH
    value_BxTxKx1xH = low_rank(x_BxTxD, lora["value_down"], lora["value_up"])[:, :, :, None]
    return jnp.concatenate([query_BxTxKxGxH, jnp.zeros_like(value_BxTxKx1xH), value_BxTxKx1xH], axis=3)


class Block(nn.Module):
    """One Transformer block, residuals included. Returns (y_BxTxD, what `attend` returned beside its output).

    `own`: what one recursion has of its own, each part optional: "encoding" a factor on the state, "norm_1" and
    "norm_2" scales in place of parameters, "lora" see `nn.Lora`. Leaves as those of a parameter, or with a leading B.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, queries_only: bool = False,
        own: dict | None = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        c = self.config
        scale = lambda name: _along_rows(own[name]["scale"]) if own and name in own else None
        if own and "encoding" in own:
            x_BxTxD = x_BxTxD * scale("encoding").astype(x_BxTxD.dtype)
        h = RMSNorm(c.norm_eps, name="norm_1")(x_BxTxD, scale("norm_1"))
        a, extra = Attention(c, name="attention")(h, rope, attend, queries_only, own)
        x = x_BxTxD + a
        h = RMSNorm(c.norm_eps, name="norm_2")(x, scale("norm_2"))
        return x + Mlp(c.mlp_width, c.init_std, name="mlp")(h), extra


def _along_rows(scale: jax.Array) -> jax.Array:
    """[D] as it is; [B, D] as [B, 1, D]."""
    return scale if scale.ndim == 1 else scale[:, None]
