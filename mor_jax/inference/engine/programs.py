"""The compiled programs of an engine, each a pure function of a donated state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.inference.engine import logs, rows
from mor_jax.inference.engine.drawing import Drawn
from mor_jax.inference.engine.layers import Weights
from mor_jax.inference.engine.logs import Layout, Log
from mor_jax.inference.engine.placement import Placement
from mor_jax.inference.engine.prefill import prefill
from mor_jax.inference.engine.rows import DrawConfig, DrawRows
from mor_jax.inference.engine.speculate import Speculation, speculative_tick
from mor_jax.inference.engine.state import NONE, Shape, State, ids_before, put_ids
from mor_jax.inference.engine.tick import Out, boundary, core_pass, tick
from mor_jax.model.depth import DepthControl
from mor_jax.model.lm import LM


def ticks(
    lm: LM, shape: Shape, config: DrawConfig, m: int, count: int, weights: Weights, state: State
) -> tuple[State, Out]:
    """`count` ticks in one program; leaves of Out [count, ...]."""
    if count == 1:
        state, out = tick(lm, shape, config, m, weights, state)
        return state, jax.tree.map(lambda leaf: leaf[None], out)
    return jax.lax.scan(
        lambda state, _: tick(lm, shape, config, m, weights, state), state, length=count
    )


def open_lane(state: State, lane: jax.Array, control: DepthControl) -> State:
    """The lane empty, under this control (leaves without the lane)."""

    def put(array: jax.Array, value: jax.Array | int) -> jax.Array:
        return array.at[lane].set(value)

    return stop_lane(state, lane)._replace(
        tokens_N=put(state.tokens_N, 0),
        entries_N=put(state.entries_N, 0),
        void_N=put(state.void_N, False),
        control=jax.tree.map(put, state.control, control),
    )


def start_lane(
    state: State, lane: jax.Array, token: jax.Array, remaining: jax.Array, row: DrawRows
) -> State:
    """Starts to decode in the lane at the next boundary, with this token."""
    return state._replace(
        next_N=state.next_N.at[lane].set(token),
        remaining_N=state.remaining_N.at[lane].set(remaining),
        draws=rows.put_row(state.draws, lane, row),
    )


def stop_lane(state: State, lane: jax.Array) -> State:
    """Stops the lane."""
    flight = state.flight._replace(
        here_N=state.flight.here_N.at[lane].set(False),
        going_N=state.flight.going_N.at[lane].set(False),
    )
    return state._replace(flight=flight, next_N=state.next_N.at[lane].set(NONE))


def mask_lane(state: State, lane: jax.Array, mask_W: jax.Array, position: jax.Array) -> State:
    """A grammar's mask for the lane's draw at `position`."""
    return state._replace(draws=rows.put_mask(state.draws, lane, mask_W, position))


def save_ends(shape: Shape, count: int, state: State, lane: jax.Array, slot: jax.Array) -> Any:
    """`count` entries of prelude and coda, with their tokens where those are kept."""
    parts = tuple(
        _read(shape.ends, part, lane, slot, count) for part in (state.prelude, state.coda)
    )
    return parts, ids_before(state.ids_NxT, lane, slot + count, count)


def save_core(shape: Shape, count: int, state: State, lane: jax.Array, slot: jax.Array) -> Any:
    """`count` entries of the core, with their tags."""
    return _read(shape.core, state.core, lane, slot, count), logs.read_tags(
        shape.core, state.tags, lane, slot, count
    )


def load_ends(
    shape: Shape, state: State, lane: jax.Array, slot: jax.Array, count: jax.Array, saved: Any
) -> State:
    """The first `count` of the saved entries in their place again."""
    saved, ids = saved
    parts = zip((state.prelude, state.coda), saved, strict=True)
    prelude, coda = (_write(shape.ends, part, lane, slot, count, rows) for part, rows in parts)
    if ids is not None:
        index = jnp.arange(len(ids))
        ids = put_ids(state.ids_NxT, lane, slot + index, ids, index < count)
    return state._replace(
        prelude=prelude, coda=coda, tokens_N=state.tokens_N.at[lane].set(slot + count), ids_NxT=ids
    )


def load_core(
    shape: Shape, state: State, lane: jax.Array, slot: jax.Array, count: jax.Array, saved: Any
) -> State:
    """As `load_ends`."""
    rows, tag = saved
    core = _write(shape.core, state.core, lane, slot, count, rows)
    tags = logs.tag_chunk(shape.core, state.tags, lane, slot, count, tag)
    return state._replace(
        core=core, tags=tags, entries_N=state.entries_N.at[lane].set(slot + count)
    )


def _read(
    where: Layout, some: Sequence[Log], lane: jax.Array, slot: jax.Array, count: int
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    return tuple(logs.read_chunk(where, log, lane, slot, count) for log in some)


def _write(
    where: Layout,
    some: Sequence[Log],
    lane: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    saved: tuple[tuple[jax.Array, jax.Array], ...],
) -> tuple[Log, ...]:
    def put(log: Log, rows: tuple[jax.Array, jax.Array]) -> Log:
        return logs.append_chunk(where, log, lane, slot, count, *rows)

    return tuple(put(log, rows) for log, rows in zip(some, saved, strict=True))


# ------------------------------------------------------------------------------------- all lanes
# busy, to be timed


def _busy(shape: Shape, state: State, going: bool, tokens: jax.Array, entries: jax.Array) -> State:
    """All lanes hold so much and have a token in flight."""
    yes = jnp.ones((shape.lanes,), bool)
    flight = state.flight._replace(
        here_N=yes,
        going_N=yes & going,
        active_N=yes & going,
        depth_N=jnp.zeros_like(state.flight.depth_N),
    )
    return state._replace(
        flight=flight,
        tokens_N=jnp.full_like(state.tokens_N, tokens),
        entries_N=jnp.full_like(state.entries_N, entries),
        remaining_N=jnp.full_like(state.remaining_N, 2),
    )


def busy_pass(
    lm: LM,
    shape: Shape,
    config: DrawConfig,
    weights: Weights,
    state: State,
    tokens: jax.Array,
    entries: jax.Array,
) -> tuple[State, jax.Array]:
    """A core pass of all lanes."""
    return core_pass(lm, shape, weights, _busy(shape, state, True, tokens, entries))


def busy_boundary(
    lm: LM,
    shape: Shape,
    config: DrawConfig,
    weights: Weights,
    state: State,
    tokens: jax.Array,
    entries: jax.Array,
) -> tuple[State, Drawn, jax.Array, jax.Array, jax.Array]:
    """A boundary of all lanes."""
    return boundary(lm, shape, config, weights, _busy(shape, state, False, tokens, entries))


# ------------------------------------------------------------------------------------- compiling


class Programs:
    """Compiled ahead of time, so that a call can never compile anything.

    `weights` and `state` show shapes and placement; their values are not used."""

    def __init__(
        self,
        lm: LM,
        shape: Shape,
        config: DrawConfig,
        weights: Weights,
        state: State,
        piece: int,
        place: Placement,
    ):
        # Shapes and placement alone, so that weights which are replaced later are not kept alive.
        def only(x: jax.Array) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

        self._static = lm, shape, config
        shown: tuple[Weights, State] = jax.tree.map(only, (weights, state))
        self._weights, self._state = shown
        self._shape, self._piece, self._place = shape, piece, place

    def _compile(self, f: Callable[..., Any], *args: Any, donate: int = 0) -> Any:
        with self._place.scope():
            where = self._place.outputs(jax.eval_shape(f, *args))
            return jax.jit(f, donate_argnums=donate, out_shardings=where).lower(*args).compile()

    def _compile_save(self, f: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """A program that copies rows out of the state, and what it returns."""
        with self._place.scope():
            saved = jax.eval_shape(f, *args)
            where = self._place.rows(saved)
            run = jax.jit(f, out_shardings=where).lower(*args).compile()
        return run, self._place.shown(saved, where)

    def timed(self, f: Callable[..., Any]) -> Any:
        """`busy_pass` or `busy_boundary`, called with (weights, state, tokens, entries)."""
        zero = np.int32(0)
        return self._compile(
            functools.partial(f, *self._static), self._weights, self._state, zero, zero, donate=1
        )

    def compile_tick(self, m: int, count: int) -> None:
        """`tick(weights, state)`."""
        self.tick = self._compile(
            functools.partial(ticks, *self._static, m, count), self._weights, self._state, donate=1
        )

    def compile_speculation(self, speculation: Speculation) -> None:
        """`tick(weights, state)` that drafts and verifies."""
        run = functools.partial(speculative_tick, *self._static, speculation)
        self.tick = self._compile(run, self._weights, self._state, donate=1)

    def compile_prefills(self, chunks: tuple[int, ...], tell: Callable[[str], None]) -> None:
        """`prefills[size](weights, state, lane, tokens, count)`."""
        lm, shape, _ = self._static
        self.prefills, zero = {}, np.int32(0)
        for size in chunks:
            tell(f"prefill of {size} tokens")
            run = functools.partial(prefill, lm, shape)
            tokens = np.zeros((size,), np.int32)
            self.prefills[size] = self._compile(
                run, self._weights, self._state, zero, tokens, zero, donate=1
            )

    def compile_small(self) -> None:
        """The rest, called as the functions are, without their static arguments."""
        state, zero, shape, piece = self._state, np.int32(0), self._shape, self._piece
        row = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), state.draws)
        control = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), state.control)
        self.open = self._compile(open_lane, state, zero, control)
        self.start = self._compile(start_lane, state, zero, zero, zero, row)
        self.stop = self._compile(stop_lane, state, zero)
        self.mask = self._compile(mask_lane, state, zero, row.grammar_NxW, zero)
        self.save, self.load = {}, {}
        for part, save, load in (("ends", save_ends, load_ends), ("core", save_core, load_core)):
            save = functools.partial(save, shape, piece)
            self.save[part], saved = self._compile_save(save, state, zero, zero)
            self.load[part] = self._compile(
                functools.partial(load, shape), state, zero, zero, zero, saved
            )


__all__ = ["Log", "Programs", "busy_boundary", "busy_pass"]
