"""A chunk of one lane's prompt, straight into the lane's logs.

A token may run step r only after all tokens before it have run theirs, so a chunk goes through the
recursion step by step: the tokens that run a step are gathered, and the step is computed in the
smallest compiled size that holds them. Then everyone passes the coda. Logs are only read until all
is computed and written at the end, outside of conditionals, in place.

The head is not needed: a prompt's last token is left out and becomes the first input of decoding.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.inference.engine import layers, logs
from mor_jax.inference.engine.layers import Weights
from mor_jax.inference.engine.logs import Layout, Log, View
from mor_jax.inference.engine.state import Shape, State, ids_before, put_ids
from mor_jax.inference.engine.tick import first_tag, newest_tag
from mor_jax.model.block import Attend
from mor_jax.model.depth import Controlled, DepthControl, TokenInfo
from mor_jax.model.kv import HYBRID, HYBRID_FIRST, SHARED, KeyValue, looks_back
from mor_jax.model.lm import LM

SMALLEST = 8  # rows; below it a product takes no less time


class Chunk(NamedTuple):
    """What a prefill says; see `device.Prefilled`."""

    depth_C: jax.Array
    tokens: jax.Array
    entries: jax.Array
    fits: jax.Array


def row_sizes(chunk: int, routed: bool) -> tuple[int, ...]:
    """Sizes a step may be computed in: none, then halves of the chunk, the chunk."""
    if not routed:
        return (chunk,)
    sizes = [chunk]
    while sizes[0] // 2 >= SMALLEST and len(sizes) < 3:
        sizes.insert(0, sizes[0] // 2)
    return (0, *sizes)


def prefill(
    lm: LM,
    shape: Shape,
    weights: Weights,
    state: State,
    lane: jax.Array,
    tokens_C: jax.Array,
    count: jax.Array,
) -> tuple[State, Chunk]:
    """tokens_C[:count] appended to the lane; nothing at all when its core log has no room for what
    they need."""
    return prefill_states(lm, shape, weights, state, lane, tokens_C, count)[:2]


def prefill_states(
    lm: LM,
    shape: Shape,
    weights: Weights,
    state: State,
    lane: jax.Array,
    tokens_C: jax.Array,
    count: jax.Array,
) -> tuple[State, Chunk, jax.Array]:
    """As `prefill`, with what the coda returned, [C, D]: what the head of a scored prompt reads."""
    chunk, recursions, kv = tokens_C.shape[0], lm.program.recursions, lm.depth.kv_name
    index_C = jnp.arange(chunk)
    real_C, pos_C = index_C < count, state.tokens_N[lane] + index_C
    rope = lm.rope(pos_C)
    seen = logs.view(shape.ends, state.tokens_N[lane][None])
    own_CxC = (index_C[None] <= index_C[:, None]) & real_C[None]

    def read(log: Log) -> Attend:
        return functools.partial(_read, log=logs.of_lane(log, lane), seen=seen, own_CxC=own_CxC)

    before_S = ids_before(state.ids_NxT, lane, state.tokens_N[lane], lm.model.smear)
    x = layers.embed(lm, weights, tokens_C, pos_C, before_S)
    x, prelude = layers.blocks(
        lm, weights["prelude"], x, rope, [read(log) for log in state.prelude]
    )
    control = jax.tree.map(lambda leaf: leaf[lane][None], state.control)
    info = TokenInfo(real_C[None], pos_C[None], tokens_C[None])
    x, active_RxC, made = _recurse(lm, shape, weights, state, lane, control, x, info, rope)
    x, coda = layers.blocks(lm, weights["coda"], x, rope, [read(log) for log in state.coda])

    depth_C = jnp.sum(active_RxC, axis=0, dtype=jnp.int32)
    # An entry of every token at step 1 where later steps look back on it, however deep it went
    # itself.
    kept_RxC = active_RxC.at[0].set(real_C) if looks_back(kv) else active_RxC
    kept_RxC = kept_RxC[:1] if kv == SHARED else kept_RxC
    step_R = jnp.arange(kept_RxC.shape[0])
    if kv == HYBRID:
        newest = step_R[:, None] == jnp.maximum(depth_C, 1) - 1
        tag_RxC = jnp.where(
            newest, newest_tag(kv, step_R, recursions)[:, None], 1 << step_R[:, None]
        )
    else:
        tag_RxC = jnp.broadcast_to(newest_tag(kv, step_R, recursions)[:, None], kept_RxC.shape)
    if kv == HYBRID_FIRST:
        tag_RxC = tag_RxC.at[0].set(first_tag(jnp.maximum(depth_C, 1), recursions))

    added = jnp.sum(kept_RxC, dtype=jnp.int32)
    slot, room = state.entries_N[lane], jnp.asarray(shape.entries, jnp.int32)[lane]
    fits = (slot + added <= room) & ~state.void_N[lane]
    added, count = jnp.where(fits, added, 0), jnp.where(fits, count, 0)
    order = jnp.argsort(~kept_RxC.reshape(-1), stable=True)  # step by step, and by position within

    def packed(rows_RxC: jax.Array) -> jax.Array:
        return jnp.take(rows_RxC.reshape(-1, *rows_RxC.shape[2:]), order, axis=0)

    def put(
        where: Layout, log: Log, slot: jax.Array, n: jax.Array, k: jax.Array, v: jax.Array
    ) -> Log:
        return logs.append_chunk(where, log, lane, slot, n, k, v)

    at = state.tokens_N[lane]
    state = state._replace(
        prelude=tuple(
            put(shape.ends, log, at, count, *new)
            for log, new in zip(state.prelude, prelude, strict=True)
        ),
        core=tuple(
            put(shape.core, log, slot, added, packed(k), packed(v))
            for log, (k, v) in zip(state.core, made, strict=True)
        ),
        coda=tuple(
            put(shape.ends, log, at, count, *new) for log, new in zip(state.coda, coda, strict=True)
        ),
        tags=logs.tag_chunk(shape.core, state.tags, lane, slot, added, packed(tag_RxC))
        if recursions > 1
        else state.tags,
        tokens_N=state.tokens_N.at[lane].add(count),
        entries_N=state.entries_N.at[lane].add(added),
        void_N=state.void_N.at[lane].set(~fits),
        ids_NxT=put_ids(state.ids_NxT, lane, pos_C, tokens_C, index_C < count),
    )
    return state, Chunk(depth_C, at + count, slot + added, fits), x


def _read(
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    *,
    log: Log,
    seen: View,
    own_CxC: jax.Array,
) -> tuple[jax.Array, KeyValue]:
    assert k is not None and v is not None, "the chunk's own"
    return logs.attend_chunk(q, log, seen, k, v, own_CxC), (k, v)


class _Step(NamedTuple):
    """What the tokens of the chunk carry from one recursion step to the next."""

    h_CxD: jax.Array
    candidates_C: jax.Array
    # newest keys and values of every token, one pair a block application; () where none are looked
    # back on
    kept: Any


def _recurse(
    lm: LM,
    shape: Shape,
    weights: Weights,
    state: State,
    lane: jax.Array,
    control: DepthControl,
    x_CxD: jax.Array,
    info_1xC: TokenInfo,
    rope: Any,
) -> tuple[jax.Array, jax.Array, list[KeyValue]]:
    """(states after the recursion, active_RxC, keys and values of every step: [R, C, K, H] a block
    application; under shared keys those of step 1 alone)."""
    chunk, kv, recursions = x_CxD.shape[0], lm.depth.kv_name, lm.program.recursions
    policy = Controlled(lm.policy, control)
    route, real_C = policy.begin(weights["router"], x_CxD[None], info_1xC), info_1xC.real_BxT[0]
    sizes = row_sizes(chunk, lm.depth.routed)
    core = tuple(logs.of_lane(log, lane) for log in state.core)
    tags = [
        t[jnp.minimum(lane, s.lanes - 1)][None] for t, s in zip(state.tags, shape.core, strict=True)
    ]

    def one(carry: _Step, xs: Any, first: bool = False) -> tuple[_Step, tuple[jax.Array, Any]]:
        r, step = xs
        seen = logs.view(
            shape.core, state.entries_N[lane][None], tags if recursions > 1 else None, r[None]
        )
        z_C = policy.score(step, carry.h_CxD[None])[0]
        active_C = policy.select(step, z_C[None], carry.candidates_C[None], route.tokens, None)[0]
        runs_C = real_C if first and looks_back(kv) else active_C
        count = jnp.sum(runs_C)
        rows = functools.partial(_rows, lm, weights, core, seen, r, first)
        if first and looks_back(kv):
            y_CxD, made = rows(chunk, carry, runs_C, rope)
        else:
            branches = [functools.partial(rows, size) for size in sizes]
            fitting = jnp.searchsorted(jnp.asarray(sizes), count) if len(sizes) > 1 else 0
            y_CxD, made = jax.lax.switch(fitting, branches, carry, runs_C, rope)
        new = policy.combine(step, carry.h_CxD[None], y_CxD[None], z_C[None], route.tokens)[0]
        h_CxD = jnp.where(active_C[:, None], new, carry.h_CxD)
        kept = (made if kv == HYBRID or first else carry.kept) if looks_back(kv) else ()
        return _Step(h_CxD, active_C, kept), (active_C, made if kv != SHARED or first else ())

    xs = (jnp.arange(recursions), route.steps)

    def at(r: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[r], xs)

    carry, (active_C, made) = one(_Step(x_CxD, real_C, ()), at(0), first=True)
    active_RxC, made_R = active_C[None], jax.tree.map(lambda a: a[None], made)
    if recursions > 1:
        carry, (later, made) = jax.lax.scan(one, carry, jax.tree.map(lambda leaf: leaf[1:], xs))
        active_RxC = jnp.concatenate([active_RxC, later])
        if kv != SHARED:
            made_R = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), made_R, made)
    return carry.h_CxD, active_RxC, made_R


def _rows(
    lm: LM,
    weights: Weights,
    core: tuple[Log, ...],
    seen: View,
    r: jax.Array,
    first: bool,
    size: int,
    carry: _Step,
    runs_C: jax.Array,
    rope: Any,
) -> tuple[jax.Array, tuple[KeyValue, ...]]:
    """The core over the tokens that run a step, gathered into `size` rows: its output and the
    newest keys and values of each block, back in their places in the chunk."""
    h_CxD, chunk, kv = carry.h_CxD, carry.h_CxD.shape[0], lm.depth.kv_name
    kv_shape = (chunk, *lm.model.dims[1:])
    if size == 0:
        none = jnp.zeros(kv_shape, h_CxD.dtype)
        return h_CxD, tuple((none, none) for _ in core) if not carry.kept else carry.kept
    whole = size == chunk
    index_S = jnp.arange(chunk) if whole else jnp.argsort(~runs_C, stable=True)[:size]
    runs_S = runs_C[index_S]
    slot_C = jnp.clip(jnp.cumsum(runs_C) - 1, 0, size - 1)  # where each of them went

    def spread(
        rows: jax.Array | None, into: jax.Array
    ) -> jax.Array:  # by a gather: XLA on CPUs scatters a row at a time
        if rows is None:
            return into
        back = rows if whole else rows[slot_C]
        return jnp.where(runs_C.reshape(-1, *(1,) * (back.ndim - 1)), back, into)

    before_SxS = (index_S[None] <= index_S[:, None]) & runs_S[None]
    before_SxC = jnp.arange(chunk)[None] <= index_S[:, None]  # padding is after all real tokens
    back = looks_back(kv) and not first

    def attend(
        q: jax.Array, k: jax.Array | None, v: jax.Array | None, block: int
    ) -> tuple[jax.Array, Any]:
        if not back:
            assert k is not None and v is not None, "the step's own"
            own, before = (k, v), before_SxS
            made = tuple(spread(x, jnp.zeros(kv_shape, x.dtype)) for x in own)
        else:
            old_k, old_v = carry.kept[block]
            own, before = (spread(k, old_k), spread(v, old_v)), before_SxC
            made = own
        return logs.attend_chunk(q, core[block], seen, *own, before), made

    h_SxD, table = jax.tree.map(lambda x: x if whole else x[index_S], (h_CxD, rope))
    attends = [functools.partial(attend, block=i) for i in range(len(core))]
    queries_only = back and kv == SHARED
    y_SxD, made = layers.blocks(
        lm, weights["core"], h_SxD, table, attends, lm.program.repeat, queries_only, r
    )
    return spread(y_SxD, h_CxD), tuple(made)
