"""KV strategies: whose keys and values a recursion step looks at (paper 2.2.2, A.3).

* "full" (fixed policy) and "recursion_wise": a step looks at the keys of the tokens that run it,
  made at that step. Steps know nothing of each other.
* "shared": keys and values are made once, at r = 1, for all tokens. Later steps project queries
  only and look at all tokens up to and including their own, however deep those went.
* "hybrid": as shared, but a token that runs step r makes its keys anew there; each query sees, of
  every token, the newest version at or below its own step.
* "hybrid_first": the released code's reading of the hybrid, that of the paper's table 15. A query
  of step r sees the keys made at step r by the tokens that run it, and of every other token those
  of step 1. The two agree up to R = 2.

Under the last three, step 1 makes keys of *every* real token, also of one that the causal rule of
expert-choice stops before it (depth 0): its state does not change, yet later tokens see it, at
every depth. That is what training with capacity 1 at r = 1 shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.model.block import Attend, EachBlock
from mor_jax.model.subset import Subset, put

SHARED, HYBRID, HYBRID_FIRST = "shared", "hybrid", "hybrid_first"

KeyValue = tuple[jax.Array, jax.Array]  # of one block: k, v [B, K, T, H], rotary embedding applied


def looks_back(kv: str) -> bool:
    """Whether later steps use keys of earlier ones."""
    return kv in (SHARED, HYBRID, HYBRID_FIRST)


def renews(kv: str) -> bool:
    """Whether tokens that run a later step make their keys anew."""
    return kv in (HYBRID, HYBRID_FIRST)


class Past(NamedTuple):
    """What steps r > 1 look back on. T is the whole row, however few tokens run the step."""

    # of each block (of blocks in a loop: stacked), of every token: the newest version, or under
    # "hybrid_first" that of step 1
    kept: Sequence[KeyValue]
    pos_BxT: jax.Array
    # Hybrids: (kept [B, K, T, H], fresh [B, K, tokens of the step, H]) -> [B, K, T, H]. None:
    # nothing is made anew.
    merge: Callable[[jax.Array, jax.Array], jax.Array] | None


def past(
    kv: str,
    kept: Sequence[KeyValue],
    pos_BxT: jax.Array,
    active_BxT: jax.Array,
    picked: Subset | None,
) -> Past:
    """Past of a step that the tokens `active_BxT` of the row run; `picked`: the positions it
    computes (None: all)."""

    def merge(kept_BxKxTxH: jax.Array, fresh: jax.Array) -> jax.Array:
        if picked is not None:
            fresh = put(picked, kept_BxKxTxH.swapaxes(1, 2), fresh.swapaxes(1, 2)).swapaxes(1, 2)
        return jnp.where(active_BxT[:, None, :, None], fresh, kept_BxKxTxH)

    return Past(kept, pos_BxT, merge if renews(kv) else None)


def attend_past(
    past: Past, pos_BxT: jax.Array, q_seg_BxT: jax.Array, kv_seg_BxS: jax.Array, impl: str
) -> EachBlock:
    """Attention of each block of a step r > 1; beside its output, the keys and values it looked
    at."""

    def of_block(kept: KeyValue) -> Attend:
        def attend(q: jax.Array, k: jax.Array | None, v: jax.Array | None) -> tuple[jax.Array, Any]:
            seen = kept
            if past.merge is not None:
                assert k is not None and v is not None, "made anew"
                seen = past.merge(kept[0], k), past.merge(kept[1], v)
            out = nn.attention(q, *seen, pos_BxT, past.pos_BxT, q_seg_BxT, kv_seg_BxS, impl)
            return out, None if past.merge is None else seen

        return attend

    return EachBlock(of_block, past.kept)
