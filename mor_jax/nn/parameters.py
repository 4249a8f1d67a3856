"""Flax modules that own the parameters of the network. They compute nothing: `model/block.py` reads
what they own.

A module is called without arguments and declares its leaves: name, shape, logical axes,
initialisation. The names of the leaves are those of the parameter tree, so they are the names that
the block, checkpoints and sharding rules use.

Letters: D width, K kv heads, G query heads a kv head, H head dim, F mlp width, V vocabulary, A
rank.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig

Axes = tuple[str | None, ...]
# A nested dict of leaves: parameters, or their shapes, shardings or logical axes.
Tree = dict[str, Any]
# names of leaves that are no matrices: they have no weight decay
VECTORS = ("scale", "bias", "smear")


def matrix(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, std: float
) -> jax.Array:
    """A float32 parameter drawn from N(0, std), annotated with logical axes."""
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return module.param(name, init, shape, jnp.float32, unbox=True)


class Scale(nn.Module):
    """scale [width]: the factor of an RMSNorm (at first 1), or of a branch."""

    width: int
    first: float = 1.0

    @nn.compact
    def __call__(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.constant(self.first), ("norm",))
        self.param("scale", init, (self.width,), jnp.float32)


class Table(nn.Module):
    """table [V, D]: one row a token; with `smear` = S also smear [S, D], at first 0.5: factors on
    the embeddings of the tokens 1..S before each."""

    vocab_size: int
    width: int
    init_std: float
    smear: int = 0

    @nn.compact
    def __call__(self) -> None:
        matrix(
            self, "table", (self.vocab_size, self.width), ("vocab", "table_embed"), self.init_std
        )
        if self.smear:
            init = nn.with_logical_partitioning(nn.initializers.constant(0.5), (None, "norm"))
            self.param("smear", init, (self.smear, self.width), jnp.float32)


class Attention(nn.Module):
    """qkv [K, G + 2, H, D] and out [D, K, G, H]; optional bias [K, G + 2, H], and q_norm/scale and
    k_norm/scale [H].

    Queries, keys and values are one matrix, grouped by kv head: its G query heads, then its key and
    its value. It can be sharded over kv heads without cutting through a group.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        heads, kv_heads, head_dim = self.config.dims
        groups, width, std = heads // kv_heads, self.config.width, self.config.init_std
        matrix(
            self,
            "qkv",
            (kv_heads, groups + 2, head_dim, width),
            ("kv_heads", None, "head_out", "embed"),
            std,
        )
        matrix(
            self,
            "out",
            (width, kv_heads, groups, head_dim),
            ("embed", "kv_heads", None, "head_out"),
            std,
        )
        if self.config.qkv_bias:
            init = nn.with_logical_partitioning(
                nn.initializers.zeros, ("kv_heads", None, "head_out")
            )
            self.param("bias", init, (kv_heads, groups + 2, head_dim), jnp.float32)
        if self.config.qk_norm:
            Scale(head_dim, name="q_norm")()
            Scale(head_dim, name="k_norm")()


class Mlp(nn.Module):
    """gate_up [2, F, D] and down [D, F] of a SwiGLU; gate and up are one matrix."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        width, hidden, std = self.config.width, self.config.mlp_width, self.config.init_std
        matrix(self, "gate_up", (2, hidden, width), (None, "mlp", "embed"), std)
        matrix(self, "down", (width, hidden), ("embed", "mlp"), std)


class Block(nn.Module):
    """One Transformer block: attention/{qkv, out}, mlp/{gate_up, down}, norm_1/scale, norm_2/scale;
    optional after_1 and after_2, the second norms of a sandwich, and branch_1 and branch_2, factors
    on what is added."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        Scale(self.config.width, name="norm_1")()
        Attention(self.config, name="attention")()
        Scale(self.config.width, name="norm_2")()
        Mlp(self.config, name="mlp")()
        for n in (1, 2):
            if self.config.norm_placement.startswith("sandwich"):
                Scale(self.config.width, name=f"after_{n}")()
            if self.config.layer_scale:
                Scale(self.config.width, self.config.layer_scale, name=f"branch_{n}")()


class Lora(nn.Module):
    """Low-rank additions to the query and value projections (LoRA, arXiv 2106.09685) of one block
    at one recursion.

    {query, value}_down [A, D], query_up [K, G, H, A], value_up [K, H, A]; the addition is `up @
    down`. `up` starts at zero, so a fresh model is the tied one. No scale is put on top: the
    learning rate is the model's.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        heads, kv_heads, head_dim = self.config.dims
        rank, std = self.config.lora_rank, self.config.init_std
        for name, shape in (
            ("query", (kv_heads, heads // kv_heads, head_dim)),
            ("value", (kv_heads, head_dim)),
        ):
            matrix(self, f"{name}_down", (rank, self.config.width), (None, "embed"), std)
            axes = ("kv_heads", *(None,) * (len(shape) - 2), "head_out", None)
            matrix(self, f"{name}_up", (*shape, rank), axes, 0.0)
