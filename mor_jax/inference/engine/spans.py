"""A few tokens in a row of every lane at once: their attention, and their entries in the logs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mor_jax.inference.engine.logs import Layout, Log, View, loaded, stored
from mor_jax.inference.engine.softmax import Softmax


def attend_spans(
    q_NxTxKxGxH: jax.Array, log: Log, seen: View, own_k_NxTxKxH: jax.Array, own_v_NxTxKxH: jax.Array,
    own_NxTxT: jax.Array,
) -> jax.Array:  # fmt: skip
    """Of T tokens a lane to its log and, by a mask, to keys of theirs that are not in the log yet. [N, T, K, G, H]."""
    q_NxKxGxTxH, dtype = jnp.moveaxis(q_NxTxKxGxH, 1, 3), q_NxTxKxGxH.dtype
    scale = q_NxTxKxGxH.shape[-1] ** -0.5

    def add(part: Softmax, q, k_NxKxSxH, v_NxKxSxH, mask_NxTxS) -> Softmax:
        score = jnp.einsum("NKGTH,NKSH->NKGTS", q, k_NxKxSxH, preferred_element_type=jnp.float32) * scale
        weigh = lambda w: jnp.einsum(
            "NKGTS,NKSH->NKGTH", w.astype(dtype), v_NxKxSxH, preferred_element_type=jnp.float32
        )
        return part.add(score, mask_NxTxS[:, None, None], weigh)

    so_far = Softmax.empty(q_NxKxGxTxH.shape)
    own_k, own_v = own_k_NxTxKxH.swapaxes(1, 2), own_v_NxTxKxH.swapaxes(1, 2)
    so_far = add(so_far, q_NxKxGxTxH, own_k, own_v, own_NxTxT)
    from_log = lambda part, q, k, v, mask: add(part, q, loaded(k, dtype), loaded(v, dtype), mask)
    for i, (k, v) in enumerate(zip(log.k, log.v, strict=True)):
        lanes = k.shape[0]
        part = jax.tree.map(lambda x, n=lanes: x[:n], so_far)
        args = (part, q_NxKxGxTxH[:lanes], k, v, seen.seen[i][:, None])
        part = jax.lax.cond(seen.reached[i], from_log, lambda part, *_: part, *args)
        join = lambda new, old: jnp.concatenate([new, old[new.shape[0] :]]) if new.shape[0] < old.shape[0] else new
        so_far = jax.tree.map(join, part, so_far)
    return jnp.moveaxis(so_far.result(dtype), 3, 1)


def _places(shape: Layout, slot_N: jax.Array, writes_NxU: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Of each segment: the lanes' numbers and where their entries go, the written ones packed from `slot_N` on; out
    of bounds where nothing is written."""
    slot_NxU = slot_N[:, None] + jnp.cumsum(writes_NxU, axis=1) - 1
    out = []
    for s in shape:
        inside = writes_NxU & (slot_NxU >= s.start) & (slot_NxU < s.start + s.size)
        out.append((jnp.arange(s.lanes)[:, None], jnp.where(inside, slot_NxU - s.start, s.size)[: s.lanes]))
    return out


def append_spans(
    shape: Layout, log: Log, slot_N: jax.Array, writes_NxU: jax.Array, k_NxUxKxH: jax.Array, v_NxUxKxH: jax.Array
) -> Log:
    """Those of the U entries of each lane that are written, from `slot_N` on."""
    places = _places(shape, slot_N, writes_NxU)

    def put(arrays: Sequence[jax.Array], new: jax.Array) -> tuple[jax.Array, ...]:
        new = stored(new)
        return tuple(
            array.at[lane, :, place].set(new[: s.lanes], mode="drop")
            for s, array, (lane, place) in zip(shape, arrays, places, strict=True)
        )

    return Log(put(log.k, k_NxUxKxH), put(log.v, v_NxUxKxH))


def tag_spans(
    shape: Layout, tags: Sequence[jax.Array], slot_N: jax.Array, writes_NxU: jax.Array, tag_NxU: jax.Array
) -> tuple[jax.Array, ...]:
    """Their tags."""
    places = _places(shape, slot_N, writes_NxU)
    return tuple(
        array.at[lane, place].set(tag_NxU[: s.lanes], mode="drop")
        for s, array, (lane, place) in zip(shape, tags, places, strict=True)
    )
