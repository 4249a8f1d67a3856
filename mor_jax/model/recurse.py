"""The executors: how a depth policy is run over the tied core.

`run_masked` computes every token at every recursion step and freezes the halted ones: one
`lax.scan` with per-token halting masks, any policy, causal or not. It is the oracle. `run_gathered`
computes only the tokens a step has capacity for, with static shapes, and equals it in values and
gradients; the steps are unrolled because each has its own length.

Both see the core as a function `core(h, pos, q_seg, kv_seg) -> (y, extra)` of [B, K, D] states and
[B, K] integers; a token whose kv_seg is HIDDEN is nobody's key. Under a KV strategy that looks back
(`model/kv.py`) `extra` is the keys and values of each block, and steps r > 1 get a `Past` as a
fifth argument; kv_seg is then the whole row's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.model.depth import DepthPolicy, RouterStats, TokenInfo
from mor_jax.model.kv import HYBRID, SHARED, KeyValue, looks_back, past, renews
from mor_jax.model.subset import Subset, put, subset, take
from mor_jax.nn.parameters import Tree
from mor_jax.parallel.rows import join_rows, own_part, parts

HIDDEN = -1  # kv segment of a token that did not run a step: matches no query

Core = Callable[..., tuple[jax.Array, Any]]
# states, who may go on, keys and values, what the policy remembers
Carry = tuple[jax.Array, jax.Array, Any, Any]


class Recursed(NamedTuple):
    """Result of the recursion."""

    h_BxTxD: jax.Array
    depth_BxT: jax.Array  # recursion steps each token ran
    stats: RouterStats
    active_RxBxT: jax.Array  # who ran each step
    # What `core` returned beside its output, stacked over the steps that made any: all, or the
    # first alone under shared keys (masked executor, if asked for); else None.
    extra: Any


def run_masked(
    policy: DepthPolicy,
    routers: Tree,
    core: Core,
    h_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    seg_BxT: jax.Array,
    *,
    causal: bool,
    kv: str = "",
    keep_extra: bool = False,
    numbered: bool = False,
    **known: jax.Array | None,
) -> Recursed:
    """All tokens through all steps under `lax.scan`; halted tokens are frozen and invisible as
    keys.

    Args:
      routers: the policy's parameters.
      seg_BxT: packing segments, 0 = padding (never recurses).
      causal: select by the threshold rule, from each token's own score, instead of top-k over the
        row.
      kv: the KV strategy.
      keep_extra: stack what `core` returns beside its output (keys and values, for a prefill).
      numbered: tell `core` the index of the step, from 0, as `recursion`.
      known: what else is known of the tokens: `ids_BxT`, `salt_B`, `depth_BxT` of `TokenInfo`.
    """
    counts = jnp.asarray(policy.profiles(h_BxTxD.shape[1] * parts())[-1], jnp.int32)
    route = policy.begin(routers, h_BxTxD, TokenInfo(seg_BxT > 0, pos_BxT, **known))

    def one(carry: Carry, xs: tuple[Any, jax.Array, jax.Array]) -> tuple[Carry, Any]:
        h, candidates, kept, memory = carry
        step, k, index = xs
        apply = functools.partial(core, recursion=index) if numbered else core
        z = policy.score(step, h)
        active = policy.select(step, z, candidates, route.tokens, None if causal else k)
        if kept is not None:
            y, made = apply(h, pos_BxT, seg_BxT, seg_BxT, past(kv, kept, pos_BxT, active, None))
            kept = made if kv == HYBRID else kept
        elif looks_back(kv):  # step 1: everyone's keys, whoever goes on
            y, made = apply(h, pos_BxT, seg_BxT, seg_BxT)
            kept = made
        else:
            y, made = apply(h, pos_BxT, seg_BxT, jnp.where(active, seg_BxT, HIDDEN))
        before, h = h, jnp.where(active[..., None], policy.combine(step, h, y, z, route.tokens), h)
        stats = (
            None if route.stats else policy.step_stats(step, z, candidates, active, route.tokens)
        )
        goes_on, memory = policy.judge(step, memory, before, h)
        left = candidates if policy.reenters else active
        left = left if goes_on is None else left & goes_on
        return (h, left, kept, memory), ((stats, active), made if keep_extra else None)

    carry: Carry = (h_BxTxD, seg_BxT > 0, None, policy.remember(h_BxTxD))
    xs = (route.steps, counts, jnp.arange(counts.shape[0]))
    if not looks_back(kv):
        carry, ((stats, active_RxBxT), extra) = jax.lax.scan(one, carry, xs)
    else:
        # Step 1 makes what the others look back on, so it stands before the scan.
        carry, (first, extra) = one(carry, jax.tree.map(lambda x: x[0], xs))
        carry, (rest, later) = jax.lax.scan(one, carry, jax.tree.map(lambda x: x[1:], xs))
        join = functools.partial(jax.tree.map, lambda a, b: jnp.concatenate([a[None], b]))
        stats, active_RxBxT = join(first, rest)
        extra = jax.tree.map(lambda a: a[None], extra) if kv == SHARED else join(extra, later)
    h, _, _, memory = carry
    stats = policy.finish_stats(memory, seg_BxT > 0, route.stats or stats)
    depth_BxT = jnp.sum(active_RxBxT, axis=0, dtype=jnp.int32)
    return Recursed(policy.finish(memory, h), depth_BxT, stats, active_RxBxT, extra)


def run_gathered(
    policy: DepthPolicy,
    routers: Tree,
    core: Core,
    h_BxTxD: jax.Array,
    pos_BxT: jax.Array,
    seg_BxT: jax.Array,
    *,
    kv: str = "",
    profile: int | None = None,
    numbered: bool = False,
    **known: jax.Array | None,
) -> Recursed:
    """Only the selected tokens through each step. Arguments as in `run_masked`.

    Args:
      profile: which of the policy's row sizes to run with; it must hold the tokens there are
        (`fitting_profile`). None: chosen at run time. Every profile is compiled, so no token is
        ever dropped; but under differentiation a run-time choice keeps room for the intermediate
        results of all of them, so a training step chooses outside of the gradient
        (`train/step.py`).
    """
    # of a row that lies on several devices, each of which runs an equal part of every step
    cut = parts()
    profiles = policy.profiles(h_BxTxD.shape[1] * cut)
    if len(profiles) == 1:
        profile = 0
    info = TokenInfo(seg_BxT > 0, pos_BxT, **known)
    if profile is None:
        depth_BxT = (
            depths_at_once(policy, routers, h_BxTxD, info)
            if info.depth_BxT is None
            else info.depth_BxT
        )
        branches = [
            lambda routers, h, depth, i=i: run_gathered(
                policy,
                routers,
                core,
                h,
                pos_BxT,
                seg_BxT,
                kv=kv,
                profile=i,
                numbered=numbered,
                **known | {"depth_BxT": depth},
            )
            for i in range(len(profiles))
        ]
        return jax.lax.switch(
            fitting_profile(profiles, join_rows(depth_BxT)), branches, routers, h_BxTxD, depth_BxT
        )
    h, pos, seg, valid = h_BxTxD, pos_BxT, seg_BxT, info.real_BxT
    route = policy.begin(routers, h, info)
    tokens = route.tokens
    outer: list[
        tuple[Subset, jax.Array]
    ] = []  # (subset, state before it was taken) of every narrowing, to be put back inside out
    all_stats: list[RouterStats] = []
    all_active: list[jax.Array] = []
    kept: Sequence[KeyValue] = ()
    picked: Subset | None = None
    for r, k in enumerate(profiles[profile]):
        room = -(-k // cut) * cut
        step = jax.tree.map(lambda leaf, r=r: leaf[r], route.steps)
        z = policy.score(step, h)
        active = policy.select(step, z, valid, tokens, k)
        if route.stats is None:
            all_stats.append(policy.step_stats(step, z, valid, active, tokens))
        if room < h.shape[1] * cut:
            # Rows with fewer tokens than there is room for are filled up, so that every row gives
            # exactly as many.
            row = join_rows(active)
            chosen = subset(row | _fill(row, room), room)
            outer.append((chosen, h))
            narrow = functools.partial(take, chosen)
            h, pos, seg, z, active, tokens = jax.tree.map(narrow, (h, pos, seg, z, active, tokens))
            if renews(kv):
                row = join_rows(_in_row(outer, jnp.ones_like(active)))
                picked = subset(row, room)  # the same tokens, by their place in the row
        all_active.append(_in_row(outer, active))
        apply = functools.partial(core, recursion=r) if numbered else core
        if not looks_back(kv):
            y, _ = apply(h, pos, seg, jnp.where(active, seg, HIDDEN))
        elif r == 0:
            assert k == seg_BxT.shape[1] * cut, (
                "everyone's keys are made at step 1, so it must run all tokens"
            )
            y, kept = apply(h, pos, seg, seg)
        else:
            y, made = apply(h, pos, seg, seg_BxT, past(kv, kept, pos_BxT, all_active[-1], picked))
            kept = made if kv == HYBRID else kept
        h = jnp.where(active[..., None], policy.combine(step, h, y, z, tokens), h)
        valid = active
        if policy.reenters:  # the whole row again
            h, outer = _put_back(outer, h), []
            pos, seg, valid, tokens = pos_BxT, seg_BxT, info.real_BxT, route.tokens
    h = _put_back(outer, h)
    active_RxBxT = jnp.stack(all_active)
    stats = route.stats or jax.tree.map(lambda *leaves: jnp.stack(leaves), *all_stats)
    return Recursed(h, jnp.sum(active_RxBxT, axis=0, dtype=jnp.int32), stats, active_RxBxT, None)


def depths_at_once(
    policy: DepthPolicy, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo
) -> jax.Array:
    """Depths [B, T] of a policy that decides before the first step."""
    return jax.lax.stop_gradient(policy.begin(routers, h_BxTxD, info).tokens.depth_BxT)


def fitting_profile(profiles: tuple[tuple[int, ...], ...], depth_BxT: jax.Array) -> jax.Array:
    """Index of the smallest profile whose row sizes hold these depths of whole rows; the last one
    always does."""
    sizes_PxR = jnp.asarray(profiles)
    ran_RxBxT = depth_BxT[None] > jnp.arange(sizes_PxR.shape[1])[:, None, None]
    need_R = jnp.max(jnp.sum(ran_RxBxT, axis=-1), axis=-1)
    return jnp.argmax(jnp.all(sizes_PxR >= need_R, axis=-1))


def _put_back(outer: list[tuple[Subset, jax.Array]], h: jax.Array) -> jax.Array:
    """States of the whole row, from those left after these narrowings."""
    for chosen, before in reversed(outer):
        h = put(chosen, before, h)
    return h


def _in_row(outer: list[tuple[Subset, jax.Array]], mask_BxK: jax.Array) -> jax.Array:
    """A mask over the tokens left after these narrowings, over the whole row."""
    for chosen, _ in reversed(outer):
        mask_BxK = put(chosen, jnp.zeros(own_part(chosen.mask_BxT).shape, bool), mask_BxK)
    return mask_BxK


def _fill(active_BxT: jax.Array, k: int) -> jax.Array:
    """Mask of the first non-active positions that bring each row up to k."""
    missing = k - jnp.sum(active_BxT, axis=-1, keepdims=True)
    return ~active_BxT & (jnp.cumsum(~active_BxT, axis=-1) <= missing)
