"""The executors: how a depth policy is run over the tied core.

`run_masked` computes every token at every recursion step and freezes the halted ones: one `lax.scan` with per-token
halting masks, any policy, causal or not. It is the oracle. `run_gathered` computes only the tokens a step has
capacity for, with static shapes, and equals it in values and gradients; the steps are unrolled because each has its
own length.

Both see the core as a function `core(h, pos, q_seg, kv_seg) -> (y, extra)` of [B, K, D] states and [B, K] integers;
a token whose kv_seg is HIDDEN is nobody's key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.model.depth import DepthPolicy
from mor_jax.model.subset import put, subset, take

HIDDEN = -1  # kv segment of a token that did not run a step: matches no query

Core = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


class RouterStats(NamedTuple):
    """Sums over the real tokens of a batch, one entry a recursion step: every leaf [R], float32."""

    aux: jax.Array  # auxiliary loss over candidates
    candidates: jax.Array  # tokens that could run the step
    selected: jax.Array  # tokens that ran it
    agree: jax.Array  # candidates for which the causal rule and the selection agree
    score: jax.Array  # sum of sigmoid(z) over candidates
    score_sq: jax.Array  # and of its square


class Recursed(NamedTuple):
    """Result of the recursion."""

    h_BxTxD: jax.Array
    depth_BxT: jax.Array  # recursion steps each token ran
    stats: RouterStats
    active_RxBxT: jax.Array  # who ran each step
    extra: Any  # what `core` returned beside its output, stacked over steps (masked executor), else None


def _stats(policy: DepthPolicy, z, candidates, active) -> RouterStats:
    weight = candidates.astype(jnp.float32)
    score = jax.nn.sigmoid(z)
    return RouterStats(
        aux=jnp.sum(policy.aux_loss(z, active.astype(jnp.float32)) * weight),
        candidates=jnp.sum(weight),
        selected=jnp.sum(active.astype(jnp.float32)),
        agree=jnp.sum((policy.continues(z) == active) * weight),
        score=jnp.sum(score * weight),
        score_sq=jnp.sum(jnp.square(score) * weight),
    )


def run_masked(
    policy: DepthPolicy, routers: dict, core: Core, h_BxTxD: jax.Array, pos_BxT: jax.Array, seg_BxT: jax.Array,
    *, causal: bool, keep_extra: bool = False,
) -> Recursed:  # fmt: skip
    """All tokens through all steps under `lax.scan`; halted tokens are frozen and invisible as keys.

    Args:
      routers: the policy's parameters, leaves [R, ...].
      seg_BxT: packing segments, 0 = padding (never recurses).
      causal: select by the threshold rule, from each token's own score, instead of top-k over the row.
      keep_extra: stack what `core` returns beside its output (keys and values, for a prefill).
    """
    counts = jnp.asarray(policy.counts(h_BxTxD.shape[1]), jnp.int32)

    def step(carry, xs):
        h, candidates = carry
        router, k = xs
        z = policy.score(router, h)
        active = policy.continues(z) & candidates if causal else policy.top(z, candidates, k)
        y, extra = core(h, pos_BxT, seg_BxT, jnp.where(active, seg_BxT, HIDDEN))
        h = jnp.where(active[..., None], policy.combine(h, y, z), h)
        return (h, active), (_stats(policy, z, candidates, active), active, extra if keep_extra else None)

    xs = (routers, counts)
    (h, _), (stats, active_RxBxT, extra) = jax.lax.scan(step, (h_BxTxD, seg_BxT > 0), xs)
    return Recursed(h, jnp.sum(active_RxBxT, axis=0, dtype=jnp.int32), stats, active_RxBxT, extra)


def run_gathered(
    policy: DepthPolicy, routers: dict, core: Core, h_BxTxD: jax.Array, pos_BxT: jax.Array, seg_BxT: jax.Array
) -> Recursed:
    """Only the selected tokens through each step, top-k selection. Arguments as in `run_masked`.

    Each step works on the subset of the step before; results go back to the full row once a step has no more takers.
    """
    length = h_BxTxD.shape[1]
    counts = policy.counts(length)
    h, pos, seg, valid = h_BxTxD, pos_BxT, seg_BxT, seg_BxT > 0
    outer = []  # (subset, state before it was taken) of every narrowing, to be put back inside out
    all_stats, all_active = [], []
    for r, k in enumerate(counts):
        router = jax.tree.map(lambda leaf, r=r: leaf[r], routers)
        z = policy.score(router, h)
        active = policy.top(z, valid, k)
        all_stats.append(_stats(policy, z, valid, active))
        if k < h.shape[1]:
            # Rows with fewer real tokens than k are filled up with padding, so that every row gives exactly k.
            chosen = subset(active | _fill(active, k), k)
            outer.append((chosen, h))
            h, pos, seg, z, active = (take(chosen, a) for a in (h, pos, seg, z, active))
        y, _ = core(h, pos, seg, jnp.where(active, seg, HIDDEN))
        h = jnp.where(active[..., None], policy.combine(h, y, z), h)
        valid = active
        for chosen, _ in reversed(outer):
            active = put(chosen, jnp.zeros(chosen.mask_BxT.shape, bool), active)
        all_active.append(active)
    for chosen, before in reversed(outer):
        h = put(chosen, before, h)
    active_RxBxT = jnp.stack(all_active)
    stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_stats)
    return Recursed(h, jnp.sum(active_RxBxT, axis=0, dtype=jnp.int32), stats, active_RxBxT, None)


def _fill(active_BxT: jax.Array, k: int) -> jax.Array:
    """Mask of the first non-active positions that bring each row up to k."""
    missing = k - jnp.sum(active_BxT, axis=-1, keepdims=True)
    return ~active_BxT & (jnp.cumsum(~active_BxT, axis=-1) <= missing)
