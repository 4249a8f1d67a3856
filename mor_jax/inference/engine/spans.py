"""A few tokens in a row of every lane at once: their attention, and their entries in the logs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mor_jax.inference.engine.logs import Layout, Log, View, loaded, places, put, put_tags
from mor_jax.inference.engine.softmax import Softmax


def attend_spans(
    q_NxTxKxGxH: jax.Array, log: Log, seen: View, own_k_NxTxKxH: jax.Array, own_v_NxTxKxH: jax.Array,
    own_NxTxT: jax.Array,
) -> jax.Array:  # fmt: skip
    """Of T tokens a lane to its log and, by a mask, to keys of theirs that are not in the log yet. [N, T, K, G, H]."""
    q_NxKxGxTxH, dtype = jnp.moveaxis(q_NxTxKxGxH, 1, 3), q_NxTxKxGxH.dtype
    scale = q_NxTxKxGxH.shape[-1] ** -0.5

    def add(part: Softmax, q, k_NxKxHxS, v_NxKxSxH, mask_NxTxS) -> Softmax:
        score = jnp.einsum("NKGTH,NKHS->NKGTS", q, k_NxKxHxS, preferred_element_type=jnp.float32) * scale
        weigh = lambda w: jnp.einsum(
            "NKGTS,NKSH->NKGTH", w.astype(dtype), v_NxKxSxH, preferred_element_type=jnp.float32
        )
        return part.add(score, mask_NxTxS[:, None, None], weigh)

    so_far = Softmax.empty(q_NxKxGxTxH.shape)
    own_k, own_v = jnp.moveaxis(own_k_NxTxKxH, 1, 3), own_v_NxTxKxH.swapaxes(1, 2)
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


def _slots(slot_N: jax.Array, writes_NxU: jax.Array) -> jax.Array:
    """[N, U]: where entries go, the written ones packed from `slot_N` on."""
    return slot_N[:, None] + jnp.cumsum(writes_NxU, axis=1) - 1


def append_spans(
    shape: Layout, log: Log, slot_N: jax.Array, writes_NxU: jax.Array, k_NxUxKxH: jax.Array, v_NxUxKxH: jax.Array
) -> Log:
    """Those of the U entries of each lane that are written, from `slot_N` on."""
    return put(log, places(shape, _slots(slot_N, writes_NxU), writes_NxU), k_NxUxKxH, v_NxUxKxH)


def tag_spans(
    shape: Layout, tags: Sequence[jax.Array], slot_N: jax.Array, writes_NxU: jax.Array, tag_NxU: jax.Array
) -> tuple[jax.Array, ...]:
    """Their tags."""
    return put_tags(tags, places(shape, _slots(slot_N, writes_NxU), writes_NxU), tag_NxU)
