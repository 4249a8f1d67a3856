"""Attention on TPUs by JAX's splash kernel: no array of tokens by tokens, forward or backward,
leaves the chip.

The kernel knows two things of a query and a key: the places of both in their rows, and their
segments. Where queries are the keys' own tokens, in row order, place i sees places up to i. Where
they are some of the tokens (shared keys, rows cut along time) each query brings the place of the
last key it sees; the kernel then skips the blocks of keys that no query of a block could see,
wherever the picked tokens lie. Both are exact as long as the keys of a document lie in the row in
the order of their positions, which they do in training.

Copies of the kernel's tensors: heads of less than 128 values stay as they are; rows are padded to
whole blocks.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mor_jax.errors import ConfigError

# of a vector register; tokens a block, for queries and keys, forward and backward
LANES, BLOCK = 128, 512
NO_QUERY, NO_KEY = -2, -3  # segments of padding: they match nothing


def refusal(dtype: str, head_dim: int, backend: str) -> str | None:
    """Why the kernel cannot run there, or None. `backend`: "tpu", or anything else JAX names so."""
    if backend != "tpu":
        return f"runs on TPUs, and this is a {backend.upper()}"
    if dtype not in ("bfloat16", "float32"):
        return f"runs in bfloat16 and float32, not in {dtype}"
    if head_dim % 8 or (head_dim > LANES and head_dim % LANES):
        return f"takes heads of a multiple of 8 values up to {LANES} and of {LANES} above, not of {head_dim}"
    return None


def splash_attention(
    q_BxKxGxTxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    q_seg_BxT: jax.Array,
    kv_seg_BxS: jax.Array,
    last_BxT: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention output [B, K, G, T, H] in the dtype of q; softmax in float32.

    Args:
      last_BxT: place among the S keys of the last that each query sees, int32, -1 where it sees
        none. It must be at most S - T + t: as it is for t-th of T queries in row order. None: T = S
        and it is t.
      interpret: run the kernel as plain JAX operations, on any backend.

    A query that sees no key gives some mean of values, as the oracle does, not the same one.
    Raises ConfigError: a head dimension that the kernel does not take.
    """
    _, kv_heads, groups, length, head_dim = q_BxKxGxTxH.shape
    keys = k_BxKxSxH.shape[2]
    why = refusal(q_BxKxGxTxH.dtype.name, head_dim, "tpu")
    if why:
        raise ConfigError(f"config.model.attention = 'splash' {why}. Use 'blocked'.")
    assert last_BxT is not None or length == keys, (
        "without places, queries are the keys' own tokens"
    )
    block_q, block_kv = (min(BLOCK, _up(n, LANES)) for n in (length, keys))
    rows, columns = _up(length, block_q), _up(keys, block_kv)
    # Exact for powers of 4, else half a unit in the last place of q.
    q = (q_BxKxGxTxH * head_dim**-0.5).astype(q_BxKxGxTxH.dtype)
    q = _pad(q, 3, rows).reshape(q.shape[0], kv_heads * groups, rows, head_dim)
    k, v = _pad(k_BxKxSxH, 2, columns), _pad(v_BxKxSxH, 2, columns)
    segments = splash_attention_kernel.SegmentIds(
        _pad(q_seg_BxT, 1, rows, NO_QUERY), _pad(kv_seg_BxS, 1, columns, NO_KEY)
    )
    # The mask says which blocks are skipped, and its function which pairs within the others are
    # seen: those whose key lies at most `offset` places behind the query's number. That number is
    # ours to choose.
    offset = keys - length
    mask = splash_attention_mask.CausalMask((rows, columns), offset=offset)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * (kv_heads * groups)),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    if last_BxT is None:
        found = jax.vmap(kernel)(q, k, v, segments)
    else:
        place = _pad(last_BxT - offset, 1, rows, -columns)
        found = jax.vmap(lambda place, *arrays: _placed(kernel, place)(*arrays))(
            place, q, k, v, segments
        )
    out = cast("jax.Array", found)  # the kernel gives more to those that ask for its residuals
    return out[:, :, :length].reshape(q_BxKxGxTxH.shape)


def _placed(
    kernel: splash_attention_kernel.SplashAttentionKernel, place_T: jax.Array
) -> splash_attention_kernel.SplashAttentionKernel:
    """The kernel for queries of these numbers instead of 0, 1, 2, ..."""
    infos, static = kernel.tree_flatten()
    infos = (info and info._replace(q_sequence=place_T) for info in infos)
    return splash_attention_kernel.SplashAttentionKernel.tree_unflatten(static, tuple(infos))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _pad(x: jax.Array, axis: int, length: int, value: int = 0) -> jax.Array:
    widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
