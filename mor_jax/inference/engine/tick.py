"""One tick of all lanes: m passes through the shared core, each lane at its own recursion step,
then the boundary.

A *pass* applies the core once to every lane, whatever step its token is at: step, router and stream
are data. At the *boundary* tokens that are done leave (coda, head, draw) and the drawn tokens enter
in their place (embedding, prelude). m = 1 is depth-wise batching: a lane whose token stops early
goes on with its next one at once. m = R is lock-step: all lanes start and end their tokens
together. The arithmetic of a token is the same for every m.

A token's key is written before it is read, and what need not be computed is skipped by a loop of no
or one round, not by a conditional: that way XLA updates the logs in place, where it would copy them
otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from mor_jax.inference.engine import layers, logs
from mor_jax.inference.engine.drawing import Drawn, draw
from mor_jax.inference.engine.layers import Weights
from mor_jax.inference.engine.logs import Layout, Log, View
from mor_jax.inference.engine.rows import DrawConfig, DrawRows, waiting
from mor_jax.inference.engine.state import NONE, Flight, Shape, State, ids_before, put_ids
from mor_jax.model.block import Attend
from mor_jax.model.depth import Controlled, TokenInfo
from mor_jax.model.kv import HYBRID, HYBRID_FIRST, SHARED, looks_back
from mor_jax.model.lm import LM

T = TypeVar("T")
Leaving = tuple[tuple[Log, ...], DrawRows, Drawn]  # logs of the coda, rows, what was drawn


class Out(NamedTuple):
    """The results of a tick for each lane; see `device.Ticked`."""

    token_N: jax.Array
    depth_N: jax.Array
    stopped_N: jax.Array
    ended_N: jax.Array
    logprob_N: jax.Array
    top_ids_NxK: jax.Array
    top_logprobs_NxK: jax.Array
    starved_N: jax.Array
    tokens_N: jax.Array
    entries_N: jax.Array
    passes: jax.Array
    rows: jax.Array
    exits: jax.Array


def tick(
    lm: LM, shape: Shape, config: DrawConfig, m: int, weights: Weights, state: State
) -> tuple[State, Out]:
    """m passes and a boundary. Static: all but the last two."""

    def one(carry: tuple[State, jax.Array, jax.Array]) -> tuple[State, jax.Array, jax.Array]:
        state, passes, rows = carry
        state, ran = core_pass(lm, shape, weights, state)
        return state, passes + 1, rows + ran

    def goes_on(carry: tuple[State, jax.Array, jax.Array]) -> jax.Array:
        return (carry[1] < m) & jnp.any(runs(lm, shape, carry[0]))

    zero = jnp.zeros((), jnp.int32)
    state, passes, rows = jax.lax.while_loop(goes_on, one, (state, zero, zero))
    starved_N = starved(lm, shape, state)
    state, drawn, depth_N, ended_N, exits = boundary(lm, shape, config, weights, state)
    return state, Out(
        drawn.token_N,
        depth_N,
        drawn.stopped_N,
        ended_N,
        drawn.logprob_N,
        drawn.top_ids_NxK,
        drawn.top_logprobs_NxK,
        starved_N,
        state.tokens_N,
        state.entries_N,
        passes,
        rows,
        exits,
    )


# ------------------------------------------------------------------------------------- routing


def _each_step(lm: LM, steps: Any, of_step: Callable[[Any], jax.Array]) -> list[jax.Array]:
    """`of_step(step)` for r = 1..R. What a policy does at a step is so little that every lane takes
    the part of its own step from the results of all."""
    return [
        of_step(jax.tree.map(lambda leaf, r=r: leaf[r], steps))
        for r in range(lm.program.recursions)
    ]


def _own(of_steps: list[jax.Array], step_N: jax.Array) -> jax.Array:
    """of_steps[step_N[i]][i]; the last one for lanes past the last step."""
    out = of_steps[-1]
    for r in range(len(of_steps) - 1):
        out = jnp.where((step_N == r).reshape(-1, *(1,) * (out.ndim - 1)), of_steps[r], out)
    return out


def _next_step(
    lm: LM, policy: Controlled, steps: Any, carried: Any, h_NxD: jax.Array, depth_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(whether the token runs the step after `depth_N`, its scores there)."""
    everyone = jnp.ones((h_NxD.shape[0], 1), bool)
    z = _each_step(lm, steps, lambda step: policy.score(step, h_NxD[:, None]))
    z_Nx1 = _own(z, depth_N)
    wants = _each_step(lm, steps, lambda step: policy.select(step, z_Nx1, everyone, carried, None))
    return _own(wants, depth_N)[:, 0] & (depth_N < lm.program.recursions), z_Nx1[:, 0]


def _where(flags_N: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Selects the new or the old value of each lane, [N, ...]."""
    return jnp.where(flags_N.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


# ------------------------------------------------------------------------------------- a core pass


def _makes(lm: LM, state: State) -> jax.Array:
    """Lanes that write keys in their next pass."""
    wants_N = state.flight.here_N & state.flight.going_N
    return wants_N & (state.flight.depth_N == 0) if lm.depth.kv_name == SHARED else wants_N


def starved(lm: LM, shape: Shape, state: State) -> jax.Array:
    """Lanes that cannot go on, because their core log has no room for the entry of their next
    pass."""
    return _makes(lm, state) & (state.entries_N >= jnp.asarray(shape.entries, jnp.int32))


def runs(lm: LM, shape: Shape, state: State) -> jax.Array:
    """Lanes that take part in the next pass."""
    return state.flight.here_N & state.flight.going_N & ~starved(lm, shape, state)


def core_pass(lm: LM, shape: Shape, weights: Weights, state: State) -> tuple[State, jax.Array]:
    """The core once for every lane that is going; (state, lanes that ran)."""
    kv, recursions, f = lm.depth.kv_name, lm.program.recursions, state.flight
    step_N, runs_N = f.depth_N, runs(lm, shape, state)
    writes_N, slot_N = runs_N & _makes(lm, state), state.entries_N
    entries_N = slot_N + writes_N
    tags = state.tags
    # what was the token's newest entry is seen by the steps up to its own alone from now on
    if kv == HYBRID:
        renews_N = writes_N & (step_N > 0)
        tags = logs.tag_lanes(shape.core, tags, slot_N - 1, renews_N, 1 << (step_N - 1))
    # the token's entry of step 1 is not seen by the steps that it runs itself
    if kv == HYBRID_FIRST:
        renews_N = writes_N & (step_N > 0)
        tags = logs.tag_lanes(
            shape.core, tags, slot_N - step_N, renews_N, first_tag(step_N + 1, recursions)
        )
    if recursions > 1:
        tags = logs.tag_lanes(
            shape.core, tags, slot_N, writes_N, newest_tag(kv, step_N, recursions)
        )
    seen = logs.view(shape.core, entries_N, tags if recursions > 1 else None, step_N)
    attends = [
        functools.partial(_grow, shape.core, log, seen, slot_N, writes_N) for log in state.core
    ]
    rope = lm.rope(state.tokens_N)
    y_NxD, core = layers.blocks(
        lm, weights["core"], f.h_NxD, rope, attends, lm.program.repeat, step=step_N
    )

    policy = Controlled(lm.policy, state.control)
    steps = policy.steps(weights["router"])
    changes_N = runs_N & f.active_N

    def combine(step: Any) -> jax.Array:
        return policy.combine(step, f.h_NxD[:, None], y_NxD[:, None], f.z_N[:, None], f.route)[:, 0]

    h_NxD = jnp.where(changes_N[:, None], _own(_each_step(lm, steps, combine), step_N), f.h_NxD)
    depth_N = f.depth_N + changes_N
    goes_on_N, z_N = _next_step(lm, policy, steps, f.route, h_NxD, depth_N)
    goes_on_N &= changes_N  # who stopped does not come back
    flight = f._replace(
        h_NxD=h_NxD,
        depth_N=depth_N,
        going_N=jnp.where(runs_N, goes_on_N, f.going_N),
        active_N=jnp.where(runs_N, goes_on_N, f.active_N),
        z_N=_where(runs_N, z_N, f.z_N),
    )
    state = state._replace(core=tuple(core), tags=tags, entries_N=entries_N, flight=flight)
    return state, jnp.sum(runs_N, dtype=jnp.int32)


def _grow(
    where: Layout,
    log: Log,
    seen: View,
    slot_N: jax.Array,
    writes_N: jax.Array,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
) -> tuple[jax.Array, Log]:
    """Attention of one block that appends to the log, then looks at it; and the log afterwards."""
    assert k is not None and v is not None, "appended"
    log = logs.append_lanes(where, log, slot_N, writes_N, k, v)
    return logs.attend_lanes(q, log, seen), log


def newest_tag(kv: str, step: jax.Array, recursions: int) -> jax.Array:
    """Tag of a token's newest entry, made at this step (from 0): the steps that see it."""
    if kv == SHARED:
        return jnp.full_like(step, (1 << recursions) - 1)
    if kv == HYBRID:
        return (1 << recursions) - (1 << step)
    if kv == HYBRID_FIRST:
        return jnp.where(step == 0, (1 << recursions) - 1, 1 << step)
    return 1 << step


def first_tag(depth: jax.Array, recursions: int) -> jax.Array:
    """Under "hybrid_first": tag of the entry of step 1 of a token that has run `depth` steps, at
    least one."""
    return ((1 << recursions) - 1) & ~((1 << depth) - 2)


# ------------------------------------------------------------------------------------- the boundary


def boundary(
    lm: LM, shape: Shape, config: DrawConfig, weights: Weights, state: State
) -> tuple[State, Drawn, jax.Array, jax.Array, jax.Array]:
    """Exit, then entry; (state, what was drawn, depth_N of the tokens it was drawn from, ended_N,
    lanes that left)."""
    f, kv = state.flight, lm.depth.kv_name
    position_N = state.tokens_N + 1
    exits_N = f.here_N & ~f.going_N & ~waiting(state.draws, position_N)
    none_N = jnp.zeros_like(f.depth_N)

    def leave(carry: Leaving) -> Leaving:
        coda, draws, _ = carry
        attends = _ends(shape, coda, state.tokens_N, exits_N)
        rope = lm.rope(state.tokens_N)
        x, coda = layers.blocks(lm, weights["coda"], f.h_NxD, rope, attends)
        drawn, draws = draw(layers.logits(lm, weights, x), draws, position_N, exits_N, config)
        return tuple(coda), draws, drawn

    top = jnp.zeros((shape.lanes, min(config.max_logprobs, config.vocab_size)))
    nothing = Drawn(none_N + NONE, none_N > 0, jnp.zeros(none_N.shape), top.astype(jnp.int32), top)
    coda, draws, drawn = _if_any(exits_N, leave, (state.coda, state.draws, nothing))
    tokens_N = state.tokens_N + exits_N
    ended_N = exits_N & (drawn.stopped_N | (state.remaining_N <= 1))
    remaining_N = state.remaining_N - exits_N

    fresh_N = (state.next_N != NONE) & ~f.here_N
    enters_N = fresh_N | (exits_N & ~ended_N)
    token_N = jnp.where(exits_N, drawn.token_N, jnp.maximum(state.next_N, 0))

    def enter(carry: tuple[tuple[Log, ...], jax.Array]) -> tuple[tuple[Log, ...], jax.Array]:
        prelude, _ = carry
        before_NxS = ids_before(state.ids_NxT, jnp.arange(shape.lanes), tokens_N, lm.model.smear)
        x = layers.embed(lm, weights, token_N[:, None], tokens_N[:, None], before_NxS)
        rope = lm.rope(tokens_N)
        x, prelude = layers.blocks(
            lm, weights["prelude"], x, rope, _ends(shape, prelude, tokens_N, enters_N)
        )
        return tuple(prelude), x

    prelude, x_NxD = _if_any(enters_N, enter, (state.prelude, f.h_NxD))
    policy = Controlled(lm.policy, state.control)
    info = TokenInfo(jnp.ones((shape.lanes, 1), bool), tokens_N[:, None], token_N[:, None])
    route = policy.begin(weights["router"], x_NxD[:, None], info)
    active_N, z_N = _next_step(lm, policy, route.steps, route.tokens, x_NxD, none_N)
    going_N = jnp.ones_like(active_N) if looks_back(kv) else active_N
    new = Flight(enters_N, x_NxD, none_N, going_N, active_N, z_N, route.tokens)
    flight = jax.tree.map(
        functools.partial(_where, enters_N), new, f._replace(here_N=f.here_N & ~exits_N)
    )
    state = state._replace(
        prelude=prelude,
        coda=coda,
        tokens_N=tokens_N,
        flight=flight,
        next_N=jnp.where(fresh_N, NONE, state.next_N),
        remaining_N=remaining_N,
        draws=draws,
        ids_NxT=put_ids(state.ids_NxT, jnp.arange(shape.lanes), tokens_N, token_N, enters_N),
    )
    return state, drawn, f.depth_N, ended_N, jnp.sum(exits_N, dtype=jnp.int32)


def _ends(
    shape: Shape, parts: tuple[Log, ...], slot_N: jax.Array, writes_N: jax.Array
) -> list[Attend]:
    """Attention of the blocks of prelude or coda for one new token in every lane that writes."""
    seen = logs.view(shape.ends, slot_N + writes_N)
    return [functools.partial(_grow, shape.ends, log, seen, slot_N, writes_N) for log in parts]


def _if_any(flags_N: jax.Array, f: Callable[[T], T], carry: T) -> T:
    """f(carry) if a flag is set, else `carry`."""

    def once(todo_carry: tuple[jax.Array, T]) -> tuple[jax.Array, T]:
        return (jnp.zeros((), bool), f(todo_carry[1]))

    return jax.lax.while_loop(lambda todo_carry: todo_carry[0], once, (jnp.any(flags_N), carry))[1]
