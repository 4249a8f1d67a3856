"""Self-speculation: the model drafts a few tokens with few recursions and verifies them in one go
with all.

One tick of all lanes is

    draft   k tokens, one after the other, by ordinary passes under a lower cap of the depth
    verify the lane's token and its k drafts as a span of k + 1 tokens at full depth: what each of
            them predicts is drawn by the lane's own parameters, and the tokens up to and including
            the first that differs from its draft are the tick's output

A draw is a function of logits, seed and position, so what is drawn at full depth is what plain
decoding draws, greedy or not; a draft only decides how many draws one tick is good for. Equal up to
the order of float32 sums, that is: a near tie of two logits may fall the other way. In bfloat16,
too, it is that order alone (`softmax.Softmax` sees to it): most texts have the same logits to the
last bit.

Drafts share the lane's logs. What they append there, keys made with few recursions, must not
outlive the draft: lengths are set back to where they were before verification reads, and
verification computes all its entries itself and appends those of the tokens that stood. Whatever
lies beyond a length is never read.

Between two ticks no token is in flight; the next one waits in `State.next_N` (compare `tick`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.inference.engine import layers, logs
from mor_jax.inference.engine.drawing import Drawn, draw
from mor_jax.inference.engine.layers import Weights
from mor_jax.inference.engine.logs import Log, append_spans, attend_spans, tag_spans
from mor_jax.inference.engine.rows import DrawConfig, DrawRows, waiting
from mor_jax.inference.engine.state import NONE, Shape, State, ids_before, put_ids
from mor_jax.inference.engine.tick import Out, boundary, core_pass, first_tag, newest_tag
from mor_jax.model.block import Attend
from mor_jax.model.depth import Controlled, TokenInfo
from mor_jax.model.kv import HYBRID, HYBRID_FIRST, SHARED, KeyValue, looks_back
from mor_jax.model.lm import LM

Fold = Callable[[jax.Array], jax.Array]


class Speculation(NamedTuple):
    """drafts: k, tokens drafted a tick. depth: recursions a draft may run. Static."""

    drafts: int
    depth: int


def speculative_tick(
    lm: LM,
    shape: Shape,
    config: DrawConfig,
    speculation: Speculation,
    weights: Weights,
    state: State,
) -> tuple[State, Out]:
    """Draft and verify; leaves of `Out` are [k + 1, ...]: the tick's tokens in order, NONE where a
    lane has no more.

    Static: all but the last two.
    """
    drafts_NxK, drafted = _draft(lm, shape, config, speculation, weights, state)
    # Everything as it was but the arrays of the logs, whose content below the lengths is as it was,
    # too.
    state = state._replace(
        prelude=drafted.prelude, core=drafted.core, coda=drafted.coda, tags=drafted.tags
    )
    return _verify(lm, shape, config, speculation, weights, state, drafts_NxK)


def _draft(
    lm: LM,
    shape: Shape,
    config: DrawConfig,
    speculation: Speculation,
    weights: Weights,
    state: State,
) -> tuple[jax.Array, State]:
    """(drafted tokens [N, k], NONE where a lane drafts no more; the state afterwards)."""
    k, depth = speculation

    def few(limit_N: jax.Array) -> jax.Array:
        return jnp.minimum(limit_N, depth)

    control = state.control._replace(
        floor_B=few(state.control.floor_B), cap_B=few(state.control.cap_B)
    )
    no_logprobs = state.draws._replace(logprobs_N=jnp.full_like(state.draws.logprobs_N, -1))
    s = state._replace(
        control=control, draws=no_logprobs, remaining_N=jnp.full_like(state.remaining_N, k)
    )

    def one(s: State, _: Any) -> tuple[State, jax.Array]:
        s, drawn, *_ = boundary(lm, shape, config, weights, s)
        for _ in range(depth):
            s = core_pass(lm, shape, weights, s)[0]
        return s, drawn.token_N

    # At the first boundary nobody leaves and the waiting tokens enter. After the last one nobody is
    # there, so that its passes are skipped.
    s, tokens_KxN = jax.lax.scan(one, s, length=k + 1)
    return tokens_KxN[1:].T, s


# ------------------------------------------------------------------------------------- verification


def _verify(
    lm: LM,
    shape: Shape,
    config: DrawConfig,
    speculation: Speculation,
    weights: Weights,
    state: State,
    drafts_NxK: jax.Array,
) -> tuple[State, Out]:
    lanes, span = shape.lanes, speculation.drafts + 1
    here_N = (state.next_N != NONE) & ~state.void_N
    tokens_NxT = jnp.maximum(jnp.concatenate([state.next_N[:, None], drafts_NxK], axis=1), 0)
    pos_NxT = state.tokens_N[:, None] + jnp.arange(span)
    rope = lm.rope(pos_NxT.reshape(-1))
    seen = logs.view(shape.ends, state.tokens_N)
    before_NxTxT = jnp.broadcast_to(jnp.tril(jnp.ones((span, span), bool)), (lanes, span, span))
    in_lanes, flat = _folds(lanes, span)

    def reader(log: Log) -> Attend:
        def attend(
            q: jax.Array, k: jax.Array | None, v: jax.Array | None
        ) -> tuple[jax.Array, KeyValue]:
            assert k is not None and v is not None, "the span's own"
            k, v = in_lanes(k), in_lanes(v)
            return flat(attend_spans(in_lanes(q), log, seen, k, v, before_NxTxT)), (k, v)

        return attend

    before_NxS = ids_before(state.ids_NxT, jnp.arange(lanes), state.tokens_N, lm.model.smear)
    x = layers.embed(lm, weights, tokens_NxT, pos_NxT, before_NxS)
    x, prelude = layers.blocks(
        lm, weights["prelude"], x, rope, [reader(log) for log in state.prelude]
    )
    x, active_RxNxT, made = _recurse(
        lm, shape, weights, state, in_lanes(x), tokens_NxT, pos_NxT, rope, here_N
    )
    x, coda = layers.blocks(lm, weights["coda"], flat(x), rope, [reader(log) for log in state.coda])
    logits_NxTxV = in_lanes(layers.logits(lm, weights, x))

    depth_NxT = jnp.sum(active_RxNxT, axis=0, dtype=jnp.int32)
    kept_NxTxR, tag_NxTxR = _entries(lm, active_RxNxT, depth_NxT, here_N)
    needed_NxT = jnp.cumsum(jnp.sum(kept_NxTxR, axis=2, dtype=jnp.int32), axis=1)
    fits_NxT = (
        state.entries_N[:, None] + needed_NxT <= jnp.asarray(shape.entries, jnp.int32)[:, None]
    )
    fits_NxT &= pos_NxT < shape.context
    draws, drawn, active_TxN, ended_TxN = _draw_span(
        config, state, logits_NxTxV, here_N, fits_NxT, pos_NxT + 1, drafts_NxK
    )

    count_N = jnp.sum(active_TxN, axis=0, dtype=jnp.int32)
    stands_NxT = jnp.arange(span) < count_N[:, None]
    entries_NxT = jax.lax.cummax(jnp.where(stands_NxT, needed_NxT, 0), axis=1)
    last_N = jnp.take_along_axis(drawn.token_N.T, jnp.maximum(count_N - 1, 0)[:, None], axis=1)[
        :, 0
    ]
    goes_on_N = jnp.where(jnp.any(ended_TxN, axis=0), NONE, last_N)
    writes_NxU = (kept_NxTxR & stands_NxT[..., None]).reshape(lanes, -1)

    def rows(made_RxNxT: jax.Array) -> jax.Array:
        return jnp.moveaxis(made_RxNxT, 0, 2).reshape(lanes, -1, *made_RxNxT.shape[3:])

    def put(parts: tuple[Log, ...], made: list[KeyValue]) -> tuple[Log, ...]:
        return tuple(
            append_spans(shape.ends, log, state.tokens_N, stands_NxT, *new)
            for log, new in zip(parts, made, strict=True)
        )

    out = Out(
        drawn.token_N,
        depth_NxT.T,
        drawn.stopped_N,
        ended_TxN,
        drawn.logprob_N,
        drawn.top_ids_NxK,
        drawn.top_logprobs_NxK,
        jnp.broadcast_to(here_N & ~fits_NxT[:, 0], (span, lanes)),
        state.tokens_N + jnp.cumsum(active_TxN, axis=0),
        state.entries_N + entries_NxT.T,
        *_counts(lm, speculation, active_RxNxT, active_TxN),
    )
    state = state._replace(
        prelude=put(state.prelude, prelude),
        core=tuple(
            append_spans(shape.core, log, state.entries_N, writes_NxU, rows(k), rows(v))
            for log, (k, v) in zip(state.core, made, strict=True)
        ),
        coda=put(state.coda, coda),
        tags=tag_spans(
            shape.core, state.tags, state.entries_N, writes_NxU, tag_NxTxR.reshape(lanes, -1)
        ),
        tokens_N=state.tokens_N + count_N,
        entries_N=state.entries_N + entries_NxT[:, -1],
        next_N=jnp.where(count_N > 0, goes_on_N, state.next_N),
        remaining_N=state.remaining_N - count_N,
        draws=draws,
        ids_NxT=put_ids(state.ids_NxT, jnp.arange(lanes)[:, None], pos_NxT, tokens_NxT, stands_NxT),
    )
    return state, out


def _folds(lanes: int, span: int) -> tuple[Fold, Fold]:
    """(rows [N * T, ...] -> [N, T, ...], and back)."""
    return lambda x: x.reshape(lanes, span, *x.shape[1:]), lambda x: x.reshape(
        lanes * span, *x.shape[2:]
    )


def _draw_span(
    config: DrawConfig,
    state: State,
    logits_NxTxV: jax.Array,
    here_N: jax.Array,
    fits_NxT: jax.Array,
    position_NxT: jax.Array,
    drafts_NxK: jax.Array,
) -> tuple[DrawRows, Drawn, jax.Array, jax.Array]:
    """Draws of the span in order, for as long as a lane's drafts stand and its entries fit.

    Returns (the rows with all drawn tokens counted, what was drawn [T, N], active_TxN,
    ended_TxN)."""
    following = jnp.concatenate([drafts_NxK, jnp.full_like(drafts_NxK[:, :1], NONE)], axis=1)

    def one(carry: Any, xs: Any) -> tuple[Any, tuple[Drawn, jax.Array, jax.Array]]:
        draws, goes_on_N, count_N = carry
        logits_NxV, fits_N, position_N, draft_N = xs
        active_N = goes_on_N & fits_N & ~waiting(draws, position_N)

        def go(logits: jax.Array, draws: DrawRows) -> tuple[Drawn, DrawRows]:
            return draw(logits, draws, position_N, active_N, config)

        def skip(
            logits: jax.Array, draws: DrawRows
        ) -> tuple[Drawn, DrawRows]:  # every lane has met a draft that did not stand
            nothing = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(go, logits, draws)[0]
            )
            return nothing._replace(token_N=nothing.token_N + NONE), draws

        drawn, draws = jax.lax.cond(jnp.any(active_N), go, skip, logits_NxV, draws)
        ended_N = active_N & (drawn.stopped_N | (state.remaining_N - count_N <= 1))
        stands_N = active_N & ~ended_N & (drawn.token_N == draft_N)
        return (draws, stands_N, count_N + active_N), (drawn, active_N, ended_N)

    xs = tuple(jnp.moveaxis(x, 1, 0) for x in (logits_NxTxV, fits_NxT, position_NxT, following))
    (draws, *_), (drawn, active_TxN, ended_TxN) = jax.lax.scan(
        one, (state.draws, here_N, jnp.zeros_like(state.tokens_N)), xs
    )
    return draws, drawn, active_TxN, ended_TxN


def _counts(
    lm: LM, speculation: Speculation, active_RxNxT: jax.Array, active_TxN: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(core passes, lanes that ran in those of the verification, both told of the first token;
    lanes that left, of each)."""

    def first(n: jax.Array | int) -> jax.Array:
        return jnp.zeros((active_TxN.shape[0],), jnp.int32).at[0].set(n)

    passes = speculation.drafts * speculation.depth + lm.program.recursions
    ran = jnp.sum(jnp.any(active_RxNxT, axis=2), dtype=jnp.int32)
    return first(passes), first(ran), jnp.sum(active_TxN, axis=1, dtype=jnp.int32)


def _entries(
    lm: LM, active_RxNxT: jax.Array, depth_NxT: jax.Array, here_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(which entries the tokens leave in the core's log, their tags), [N, T, R]; R is 1 under
    shared keys."""
    kv, recursions = lm.depth.kv_name, lm.program.recursions
    # An entry of every token at step 1 where later steps look back on it, however deep it went
    # itself.
    kept = active_RxNxT.at[0].set(here_N[:, None]) if looks_back(kv) else active_RxNxT
    kept = kept[:1] if kv == SHARED else kept
    step = jnp.arange(kept.shape[0])[:, None, None]
    tag = newest_tag(kv, step, recursions)
    if kv == HYBRID:
        tag = jnp.where(step == jnp.maximum(depth_NxT, 1) - 1, tag, 1 << step)
    if kv == HYBRID_FIRST:
        tag = (
            jnp.broadcast_to(tag, kept.shape)
            .at[0]
            .set(first_tag(jnp.maximum(depth_NxT, 1), recursions))
        )
    return jnp.moveaxis(kept, 0, 2), jnp.moveaxis(jnp.broadcast_to(tag, kept.shape), 0, 2)


class _Step(NamedTuple):
    """What the span carries from one recursion step to the next."""

    h_NxTxD: jax.Array
    candidates_NxT: jax.Array
    # newest keys and values of every token, one pair a block application; () where none are looked
    # back on
    kept: Any


def _recurse(
    lm: LM,
    shape: Shape,
    weights: Weights,
    state: State,
    x_NxTxD: jax.Array,
    tokens_NxT: jax.Array,
    pos_NxT: jax.Array,
    rope: Any,
    here_N: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """(states after the recursion, active_RxNxT, keys and values of every step: [R, N, T, K, H] a
    block application; under shared keys those of step 1 alone)."""
    lanes, span, _ = x_NxTxD.shape
    kv, recursions = lm.depth.kv_name, lm.program.recursions
    real_NxT = jnp.broadcast_to(here_N[:, None], (lanes, span))
    before_TxT = jnp.tril(jnp.ones((span, span), bool))
    in_lanes, flat = _folds(lanes, span)
    none = jnp.zeros((lanes, span, *lm.model.dims[1:]), x_NxTxD.dtype)
    policy = Controlled(lm.policy, state.control)
    route = policy.begin(weights["router"], x_NxTxD, TokenInfo(real_NxT, pos_NxT, tokens_NxT))

    def one(carry: _Step, xs: Any, first: bool = False) -> tuple[_Step, tuple[jax.Array, Any]]:
        r, step = xs
        back = looks_back(kv) and not first
        seen = logs.view(shape.core, state.entries_N, state.tags, jnp.broadcast_to(r, (lanes,)))
        z_NxT = policy.score(step, carry.h_NxTxD)
        active_NxT = policy.select(step, z_NxT, carry.candidates_NxT, route.tokens, None)
        runs_NxT = real_NxT if first and looks_back(kv) else active_NxT

        def attend(
            q: jax.Array, k: jax.Array | None, v: jax.Array | None, block: int
        ) -> tuple[jax.Array, KeyValue]:
            old = carry.kept[block] if back else (none, none)

            def newer(new: jax.Array | None, old: jax.Array) -> jax.Array:
                return (
                    old if new is None else jnp.where(runs_NxT[..., None, None], in_lanes(new), old)
                )

            made = newer(k, old[0]), newer(v, old[1])
            own = before_TxT & (real_NxT if back else runs_NxT)[:, None]
            return flat(attend_spans(in_lanes(q), state.core[block], seen, *made, own)), made

        def run(h_NxTxD: jax.Array) -> tuple[jax.Array, Any]:
            attends = [lambda q, k, v, i=i: attend(q, k, v, i) for i in range(len(state.core))]
            queries_only = back and kv == SHARED
            y, made = layers.blocks(
                lm,
                weights["core"],
                flat(h_NxTxD),
                rope,
                attends,
                lm.program.repeat,
                queries_only,
                r,
            )
            return in_lanes(y), tuple(made)

        def skip(h_NxTxD: jax.Array) -> tuple[jax.Array, Any]:
            return h_NxTxD, carry.kept if back else tuple((none, none) for _ in state.core)

        y_NxTxD, made = jax.lax.cond(jnp.any(runs_NxT), run, skip, carry.h_NxTxD)
        new = policy.combine(step, carry.h_NxTxD, y_NxTxD, z_NxT, route.tokens)
        h_NxTxD = jnp.where(active_NxT[..., None], new, carry.h_NxTxD)
        kept = (made if kv == HYBRID or first else carry.kept) if looks_back(kv) else ()
        return _Step(h_NxTxD, active_NxT, kept), (active_NxT, made if kv != SHARED or first else ())

    xs = (jnp.arange(recursions), route.steps)

    def at(r: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[r], xs)

    carry, (active_NxT, made) = one(_Step(x_NxTxD, real_NxT, ()), at(0), first=True)
    carry, (later, made_later) = jax.lax.scan(one, carry, jax.tree.map(lambda leaf: leaf[1:], xs))
    active = jnp.concatenate([active_NxT[None], later])
    made = jax.tree.map(lambda a: a[None], made)
    if kv != SHARED:
        made = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), made, made_later)
    return carry.h_NxTxD, active, made


__all__ = ["Speculation", "speculative_tick"]
