"""The device state between two calls: the logs of all lanes, and the token that each lane is
computing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.inference.engine.logs import Layout, Log, empty_log, empty_tags, layout
from mor_jax.inference.engine.rows import DrawConfig, DrawRows, empty_rows
from mor_jax.model.depth import DepthControl, TokenInfo
from mor_jax.model.lm import LM

NONE = -1  # no token


class Shape(NamedTuple):
    """What the programs are compiled for. Static.

    context: longest sequence. entries: room of each lane's core log; must not rise from lane to
    lane.
    """

    context: int
    entries: tuple[int, ...]

    @property
    def lanes(self) -> int:
        return len(self.entries)

    @property
    def ends(self) -> Layout:
        """Layout of the prelude's and the coda's logs."""
        return layout((self.context,) * self.lanes)

    @property
    def core(self) -> Layout:
        return layout(self.entries)


class Flight(NamedTuple):
    """The token that each lane is working on, between its entry and its exit.

    `going`: a core pass is to come, because the token runs the next step (`active`), or, under
    strategies that look back, because step 1 makes its keys even if it stops before it. A token in
    flight that is not going waits for the boundary.
    """

    here_N: jax.Array  # bool: there is a token
    h_NxD: jax.Array
    depth_N: jax.Array  # steps it has run
    going_N: jax.Array
    active_N: jax.Array
    z_N: jax.Array  # score of the next step; [N, 2] where another router decides
    route: Any  # what the policy lets it carry, leaves [N, 1, ...]


class State(NamedTuple):
    """Donated to every call. T of a lane: the tokens it has finished, so the position of the one in
    flight."""

    prelude: tuple[Log, ...]  # one a block application
    core: tuple[Log, ...]
    coda: tuple[Log, ...]
    tags: tuple[jax.Array, ...]  # of the core's entries
    tokens_N: jax.Array  # T; the prelude holds one more while a token is in flight
    entries_N: jax.Array  # of the core log
    void_N: jax.Array  # bool: a prompt did not fit, nothing may be added
    flight: Flight
    next_N: jax.Array  # token that enters at the next boundary, or NONE
    remaining_N: jax.Array  # tokens still to draw
    draws: DrawRows
    control: DepthControl
    # tokens by position, of a model that mixes in those before (`model.smear`)
    ids_NxT: jax.Array | None = None


def empty_state(lm: LM, shape: Shape, draw: DrawConfig, routers: Any) -> State:
    """A state in which every lane is free."""
    _, kv_heads, head_dim = lm.model.dims
    lanes, width, p = shape.lanes, lm.model.width, lm.program

    def log(where: Layout) -> Log:
        return empty_log(where, kv_heads, head_dim, lm.model.dtype)

    def logs(where: Layout, count: int) -> tuple[Log, ...]:
        return tuple(log(where) for _ in range(count))

    zeros, no = jnp.zeros((lanes,), jnp.int32), jnp.zeros((lanes,), bool)
    h_NxD = jnp.zeros((lanes, width), lm.model.dtype)
    control = DepthControl.neutral(lanes, p.recursions)

    def first(routers: Any, h_NxD: jax.Array) -> tuple[jax.Array, Any]:
        info = TokenInfo(jnp.ones((lanes, 1), bool), zeros[:, None], zeros[:, None])
        route = lm.policy.begin(routers, h_NxD[:, None], info)
        z = lm.policy.score(jax.tree.map(lambda leaf: leaf[0], route.steps), h_NxD[:, None])
        return z[:, 0], route.tokens

    shapes = jax.eval_shape(first, routers, h_NxD)
    z_N, route = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return State(
        logs(shape.ends, p.prelude),
        logs(shape.core, p.core * p.repeat),
        logs(shape.ends, p.coda),
        empty_tags(shape.core),
        zeros,
        zeros,
        no,
        Flight(no, h_NxD, zeros, no, no, z_N, route),
        zeros + NONE,
        zeros,
        empty_rows(lanes, draw),
        control,
        jnp.zeros((lanes, shape.context), jnp.int32) if lm.model.smear else None,
    )


def put_ids(
    ids_NxT: jax.Array | None, lane: jax.Array, slot: jax.Array, ids: jax.Array, stays: jax.Array
) -> jax.Array | None:
    """`ids` written at these lanes and slots where they stay; all of one shape. Nothing where no
    tokens are kept."""
    if ids_NxT is None:
        return None
    return ids_NxT.at[lane, jnp.where(stays, slot, ids_NxT.shape[1])].set(ids, mode="drop")


def ids_before(
    ids_NxT: jax.Array | None, lane: jax.Array, slot: jax.Array, count: int
) -> jax.Array | None:
    """The `count` tokens before these slots of these lanes, [..., count]; any where there are
    none."""
    if ids_NxT is None:
        return None
    return ids_NxT[lane[..., None], jnp.maximum(slot[..., None] - jnp.arange(count, 0, -1), 0)]
