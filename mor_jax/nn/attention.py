"""Attention as one function of arrays; the plain XLA version is the oracle of every other
implementation.

A key is visible to a query when it is not later in its document and belongs to the same document:
`kv_pos <= q_pos and kv_seg == q_seg`. Segment 0 is padding. Anything that selects tokens
(recursion-wise caching, gathered recursion steps, a decode cache with unused entries) is expressed
through these four integer arrays alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mor_jax.config import ModelConfig
from mor_jax.errors import ConfigError
from mor_jax.kernels import splash
from mor_jax.parallel.mesh import backend
from mor_jax.parallel.rows import join_rows, manual_axes, parts

# finite: a row with nothing visible stays finite, and its gradient is zeroed by the caller
MASKED = -1e30


def attention(
    q_BxKxGxTxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    q_pos_BxT: jax.Array,
    kv_pos_BxS: jax.Array,
    q_seg_BxT: jax.Array,
    kv_seg_BxS: jax.Array,
    impl: str = "xla",
) -> jax.Array:
    """Grouped-query attention output [B, K, G, T, H] in the dtype of q; softmax in float32.

    `impl`: "xla" for any arrays; "blocked" when the queries are those of the keys' tokens, or of
    some of them, both in row order (training rows, gathered or not), so that no block of queries
    needs every key; "splash" for the same on TPUs; "cudnn" on NVIDIA GPUs in bfloat16, segments
    included as a mask; "auto" what suits the backend (`choose`).

    Where rows are cut along time over devices (`parallel/rows.py`), every argument is a part of its
    row: keys and values of the whole row are gathered, queries stay where they are.

    Raises ConfigError: the implementation cannot run on this backend, with this dtype or head
    dimension.
    """
    impl = choose(impl, backend(), q_BxKxGxTxH.dtype.name, q_BxKxGxTxH.shape[-1])
    if parts() > 1:
        k_BxKxSxH, v_BxKxSxH = (
            join_rows(k_BxKxSxH, axis=2, heads=1),
            join_rows(v_BxKxSxH, axis=2, heads=1),
        )
        kv_pos_BxS, kv_seg_BxS = join_rows(kv_pos_BxS), join_rows(kv_seg_BxS)
    return _IMPLEMENTATIONS[impl](
        q_BxKxGxTxH, k_BxKxSxH, v_BxKxSxH, q_pos_BxT, kv_pos_BxS, q_seg_BxT, kv_seg_BxS
    )


def choose(impl: str, backend: str, dtype: str, head_dim: int) -> str:
    """The implementation to run: "auto" becomes "splash" on TPUs and "blocked" elsewhere, any other
    stays. ("cudnn" is only taken by name: it is given an array of queries by keys, for each head,
    as its mask.)

    Raises ConfigError for one that cannot run on this backend, with this dtype or head
    dimension."""
    if impl == "auto":
        return "splash" if _refusal("splash", backend, dtype, head_dim) is None else "blocked"
    if impl not in _IMPLEMENTATIONS:
        raise ConfigError(
            f"No attention implementation {impl!r}. Valid: auto, {', '.join(_IMPLEMENTATIONS)}."
        )
    if why := _refusal(impl, backend, dtype, head_dim):
        other = choose("auto", backend, dtype, head_dim)
        raise ConfigError(
            f"config.model.attention = {impl!r} {why}. Use 'auto', which picks what the backend can run, here {other!r}."
        )
    return impl


def chosen_for(model: ModelConfig) -> str:
    """`choose` for a model on the devices in scope."""
    return choose(model.attention, backend(), model.dtype, model.dims[2])


def _refusal(impl: str, backend: str, dtype: str, head_dim: int) -> str | None:
    if impl == "splash":
        return splash.refusal(dtype, head_dim, backend)
    if impl == "cudnn" and backend != "gpu":
        return f"runs on NVIDIA GPUs, and this is a {backend.upper()}"
    if impl == "cudnn" and dtype != "bfloat16":
        return f"runs in bfloat16, not in {dtype}"
    if impl == "cudnn" and (head_dim % 8 or head_dim > 128):
        return f"takes heads of a multiple of 8 values up to 128, not of {head_dim}"
    return None


def visible(
    q_pos_BxT: jax.Array, kv_pos_BxS: jax.Array, q_seg_BxT: jax.Array, kv_seg_BxS: jax.Array
) -> jax.Array:
    """Boolean [B, T, S]: may query t look at key s."""
    causal = kv_pos_BxS[:, None, :] <= q_pos_BxT[:, :, None]
    return causal & (kv_seg_BxS[:, None, :] == q_seg_BxT[:, :, None])


def _masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    kv_pos: jax.Array,
    q_seg: jax.Array,
    kv_seg: jax.Array,
) -> jax.Array:
    scale = q.shape[-1] ** -0.5
    s_BxKxGxTxS = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    mask = visible(q_pos, kv_pos, q_seg, kv_seg)[:, None, None]
    p = jax.nn.softmax(jnp.where(mask, s_BxKxGxTxS, MASKED), axis=-1)
    return jnp.einsum("BKGTS,BKSH->BKGTH", p.astype(v.dtype), v)


def _blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    kv_pos: jax.Array,
    q_seg: jax.Array,
    kv_seg: jax.Array,
    block: int = 128,
) -> jax.Array:
    """Queries in blocks, each against the keys up to its own end: about half the products of the
    full square, and no [T, T] array. The division by the softmax's sum is left to the much smaller
    output.

    Where T queries are picked from S > T tokens, nothing is known of which, but the i-th of them
    has T - i picked ones behind it, so its place is at most S - T + i: that is where the keys of
    its block end. (The same holds of a part of the queries of a row that is cut along time, so the
    bound is right there too, only loose.)"""
    length, unpicked = q.shape[-2], k.shape[-2] - q.shape[-2]
    scale = q.shape[-1] ** -0.5
    out = []
    for start in range(0, length, block):
        end = min(start + block, length)
        last = end + unpicked
        seen = visible(q_pos[:, start:end], kv_pos[:, :last], q_seg[:, start:end], kv_seg[:, :last])
        s_BxKxGxTxS = jnp.einsum(
            "BKGTH,BKSH->BKGTS",
            q[..., start:end, :],
            k[..., :last, :],
            preferred_element_type=jnp.float32,
        )
        s = s_BxKxGxTxS * scale + jnp.where(seen, 0.0, MASKED)[:, None, None]
        p = jnp.exp(s - jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True)))
        o = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            p.astype(v.dtype),
            v[..., :last, :],
            preferred_element_type=jnp.float32,
        )
        out.append((o / jnp.sum(p, axis=-1, keepdims=True)).astype(q.dtype))
    return jnp.concatenate(out, axis=-2) if len(out) > 1 else out[0]


def _cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    kv_pos: jax.Array,
    q_seg: jax.Array,
    kv_seg: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Through `jax.nn.dot_product_attention` (layout [B, T, heads, H]). The mask must be of full
    [B, N, T, S] shape: cuDNN turns it into a bias and broadcasts nothing (jax issue 28974)."""
    batch, kv_heads, groups, length, head_dim = q.shape
    q_BxTxNxH = q.reshape(batch, kv_heads * groups, length, head_dim).swapaxes(1, 2)
    mask = visible(q_pos, kv_pos, q_seg, kv_seg)[:, None]
    o_BxTxNxH = jax.nn.dot_product_attention(
        q_BxTxNxH,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        mask=jnp.broadcast_to(mask, (batch, kv_heads * groups, *mask.shape[2:])),
        implementation=implementation,
    )
    return o_BxTxNxH.swapaxes(1, 2).reshape(q.shape)


def _splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    kv_pos: jax.Array,
    q_seg: jax.Array,
    kv_seg: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """By `kernels/splash.py`. The partitioner cannot cut a kernel, so every axis of the mesh is
    made manual: heads lie over `tensor`, and the axes of rows are manual already or of size 1."""
    own = q.shape[3] == k.shape[2]  # queries are the keys' own tokens
    last_BxT = None if own else _last_seen(q_pos, kv_pos, q_seg, kv_seg)

    def run(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_seg: jax.Array,
        kv_seg: jax.Array,
        last_BxT: jax.Array | None,
    ) -> jax.Array:
        return splash.splash_attention(q, k, v, q_seg, kv_seg, last_BxT, interpret)

    return _by_heads(run, (q, k, v), (q_seg, kv_seg, last_BxT))


def _by_heads(
    run: Callable[..., jax.Array], heads: tuple[jax.Array, ...], rows: tuple[jax.Array | None, ...]
) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    others = set(mesh.axis_names) - manual_axes()
    if not others:
        return run(*heads, *rows)
    cut = PartitionSpec(None, "tensor" if "tensor" in others else None)
    specs = (*[cut] * len(heads), *[PartitionSpec()] * len(rows))
    return jax.shard_map(run, in_specs=specs, out_specs=cut, axis_names=others, check_vma=False)(
        *heads, *rows
    )


def _last_seen(
    q_pos_BxT: jax.Array, kv_pos_BxS: jax.Array, q_seg_BxT: jax.Array, kv_seg_BxS: jax.Array
) -> jax.Array:
    """Place of the last key that each query sees, [B, T] int32; -1 where it sees none."""
    seen_BxTxS = visible(q_pos_BxT, kv_pos_BxS, q_seg_BxT, kv_seg_BxS)
    place_S = jnp.arange(kv_pos_BxS.shape[1], dtype=jnp.int32)
    return jnp.max(jnp.where(seen_BxTxS, place_S, -1), axis=-1)


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _masked_attention,
    "blocked": _blocked_attention,
    "cudnn": _cudnn_attention,
    "splash": _splash_attention,
}
