"""The device side of the engine: compiled programs over one donated state, and what the host may
ask of them.

A lane's life: `open`, `load` saved rows of a prefix, `prefill` the rest of the prompt but its last
token, `start` with that token, `tick` until it ends, `stop`. Every call enqueues work and returns;
tickets are fetched later, in the order they were made. One thread calls all of this.

What a lane computes depends on its own tokens alone, to the last bit: the number of lanes and the
sizes of chunks are fixed, rows do not mix, and a draw's noise is a function of the request's seed
and the position.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mor_jax.errors import UserError
from mor_jax.inference.engine import choose, layers, programs
from mor_jax.inference.engine.layers import WeightFormat
from mor_jax.inference.engine.placement import Placement
from mor_jax.inference.engine.prefill import Chunk
from mor_jax.inference.engine.rows import DrawConfig, DrawRows
from mor_jax.inference.engine.speculate import Speculation
from mor_jax.inference.engine.state import NONE, Shape, State
from mor_jax.inference.engine.tick import Out
from mor_jax.model.depth import DepthControl
from mor_jax.model.kv import SHARED
from mor_jax.model.lm import LM

# of a lane's core log over what the expected depth needs: depths of one text scatter
SLACK, SPARE = 1.1, 16
PIECE = 64  # entries a piece of saved rows has room for


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; all of them static.

    boundary_every: m, core passes between two boundaries, 1..R; None: the best by formula, from
      times measured at warm-up and the expected depths.
    full_lanes: so many lanes have room for `context` tokens of full depth; at least one, so that
      every request fits somewhere. The others have room for `entries` (0: `context` tokens of the
      expected depth, with a little slack).
    """

    lanes: int = 8
    context: int = 0  # tokens, longest sequence; 0: the model's
    chunks: tuple[int, ...] = (16, 64, 256)  # tokens, sizes of prefill programs
    boundary_every: int | None = None
    candidates: int = 128  # see `rows.DrawConfig`
    max_logprobs: int = 20
    full_lanes: int = 1
    entries: int = 0
    ticks_per_dispatch: int = 1
    # tokens that a tick drafts with few recursions and verifies with all; 0: none (`speculate.py`)
    speculate: int = 0
    draft_depth: int = 1  # recursions a draft may run, fewer than the model's
    weights: WeightFormat = "compute"  # how matrices are kept, see `layers.prepare`


# -------------------------------------------------------------------- what dispatched work returns


class Lengths(NamedTuple):
    """Entries in use: one a token in prelude and coda, and those of the core's log."""

    tokens: int
    entries: int


class Prefilled(NamedTuple):
    """`fits` False: the core log has no room for the chunk, so nothing was written, and nothing
    will be by later prefills of this lane. It needs a lane with more room."""

    depth_T: np.ndarray
    lengths: Lengths
    fits: bool


class Ticked(NamedTuple):
    """One tick, [lanes]. A lane that was stopped since the tick was dispatched says nothing.

    token_N: NONE (-1): nothing was drawn. depth_N: recursions that were run to draw it. stopped_N:
    it is one of the stop tokens. ended_N: the lane draws no more, by a stop token or because
    `remaining` ran out. starved_N: the lane stands still since its core log is full; nothing is
    lost, it needs a lane with more room. passes: core passes that ran; rows: lanes that ran, summed
    over them; exits: lanes that left through the boundary.
    """

    token_N: np.ndarray
    depth_N: np.ndarray
    stopped_N: np.ndarray
    ended_N: np.ndarray
    logprob_N: np.ndarray
    top_ids_NxK: np.ndarray
    top_logprobs_NxK: np.ndarray
    starved_N: np.ndarray
    tokens_N: np.ndarray
    entries_N: np.ndarray
    passes: int
    rows: int
    exits: int


class Piece(NamedTuple):
    """Saved entries slot .. slot + count of one part ("ends" or "core"), in arrays with room for
    PIECE of them."""

    part: str
    slot: int
    count: int  # type: ignore[assignment]  # not tuple.count
    arrays: Any


@dataclass(frozen=True)
class Rows:
    """Saved entries start .. stop of a lane, on device; forget them to free them."""

    start: Lengths
    stop: Lengths
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for piece in self.pieces for leaf in jax.tree.leaves(piece.arrays))


class Ticket:
    """A handle to dispatched work. Call `fetch` once."""

    def __init__(self, arrays: Any, read: Callable[[Any], Any]):
        self._arrays, self._read = arrays, read
        for leaf in jax.tree.leaves(arrays):
            leaf.copy_to_host_async()

    def ready(self) -> bool:
        """Whether `fetch` would return at once."""
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self._arrays))

    def fetch(self) -> Any:
        """Waits for the work and returns its result."""
        return self._read(jax.tree.map(np.asarray, self._arrays))


# ------------------------------------------------------------------------------------- the device


class Device:
    """The programs of one model and the state of its lanes.

    Args:
      params: as `LM.init` returns them; placed, cast and flattened once, here.
      vocab_size: ids from here on are padding of the model's table and are never drawn.
      mesh: weights and logs are cut over its axis `tensor`, see `placement.py`; where it is 1
        they are whole on each of its devices. Default: the default device.
    Raises:
      UserError: sizes that cannot be.
    """

    def __init__(
        self,
        lm: LM,
        params: Any,
        config: EngineConfig | None = None,
        *,
        vocab_size: int | None = None,
        mesh: Mesh | None = None,
    ):
        config = config or EngineConfig()
        self.lm, self.config, self.recursions = lm, config, lm.program.recursions
        check_sizes(lm, config)
        self.lanes, self.context = config.lanes, config.context or lm.model.context
        self.chunks = tuple(sorted({min(c, self.context) for c in config.chunks}))
        self.draw_config = DrawConfig(
            vocab_size or lm.model.vocab_size, config.candidates, config.max_logprobs
        )
        self.shares = choose.shares(lm, params)
        self.placement = Placement(mesh, lm.rules)
        self.set_params(params)
        self.shape = shape_of(lm, config, self.shares)
        self.m = config.boundary_every or self.recursions
        # (seconds a core pass, a boundary), measured at warm-up
        self.times: tuple[float, float] | None = None
        self._state = self._empty()
        self._lengths = [Lengths(0, 0)] * self.lanes
        self._queued = [0] * self.lanes  # tokens in each lane once all that was enqueued is done
        self._lives = [0] * self.lanes  # of each lane, counted up when it is opened or stopped
        self._neutral = _row(DepthControl.neutral(1, self.recursions))
        self._programs: programs.Programs | None = None
        self.drafted = self.accepted = 0  # tokens, by speculation, as of the tick fetched last

    def _empty(self) -> State:
        return self.placement.empty_state(
            self.lm, self.shape, self.draw_config, self._weights["router"]
        )

    def set_params(self, params: Any) -> None:
        """Other weights of the same shape, from the next call on. What is in the logs, and saved
        rows, are of the old ones."""
        self._weights = self.placement.prepare(self.lm, params, self.config.weights)

    @property
    def weights(self) -> layers.Weights:
        """As the programs read them."""
        return self._weights

    @property
    def warm(self) -> bool:
        """Every program is compiled."""
        return self._programs is not None

    def reset(self) -> None:
        """Every lane free and empty, after a call that failed: it may have taken the state with
        it."""
        self._state = self._empty()
        self._lives = [life + 1 for life in self._lives]

    # -------------------------------------------------------------------------------------
    # compiling

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile every program; nothing compiles afterwards. Chooses m where it was left open, for
        which it measures a core pass and a boundary. `progress` is told what is being done."""
        tell = progress or (lambda text: None)
        made, c = self.uncompiled(), self.config
        if c.boundary_every is None and self.recursions > 1 and not c.speculate:
            tell("measuring a core pass and a boundary")
            half = self.context // 2
            self.times = self.measure(
                self.probes(), half, min(self.expected_entries(half), self.shape.entries[-1])
            )
            self.m = choose.best(self.lanes, self.shares, *self.times)
        tell("ticks")
        if c.speculate:
            made.compile_speculation(Speculation(c.speculate, c.draft_depth))
        else:
            made.compile_tick(self.m, c.ticks_per_dispatch)
        made.compile_prefills(self.chunks, tell)
        tell("lanes")
        made.compile_small()
        self.use(made)

    def uncompiled(self) -> programs.Programs:
        """The programs, none of them compiled yet: `warm_up` in pieces, for measurements."""
        return programs.Programs(
            self.lm, self.shape, self.draw_config, self._weights, self._state, PIECE, self.placement
        )

    @property
    def _compiled(self) -> programs.Programs:
        assert self._programs is not None, "`warm_up` has been called"
        return self._programs

    def use(self, made: programs.Programs) -> None:
        """Run these from now on."""
        self._programs = made

    def probes(self) -> tuple[Any, Any]:
        """A core pass and a boundary compiled on their own, for `measure`."""
        made = self.uncompiled()
        return made.timed(programs.busy_pass), made.timed(programs.busy_boundary)

    def measure(
        self, probes: tuple[Any, Any], tokens: int, entries: int, repeats: int = 7
    ) -> tuple[float, float]:
        """Median seconds of (a core pass, a boundary), all lanes busy and with so much in their
        logs. Empties every lane."""
        fill = np.int32(tokens), np.int32(entries)
        walls: list[list[float]] = [[], []]
        for _ in range(repeats + 1):  # in turns, so that what disturbs the machine disturbs both
            for probe, wall in zip(probes, walls, strict=True):
                jax.block_until_ready(self._state)
                begin = time.perf_counter()
                self._state, *rest = probe(self._weights, self._state, *fill)
                jax.block_until_ready((self._state, rest))
                wall.append(time.perf_counter() - begin)
        del self._state  # before there is another
        self._state = self._empty()
        core, boundary = (statistics.median(wall[1:]) for wall in walls)
        return core, boundary

    # ------------------------------------------------------------------------------------- a lane's
    # life

    def open(self, lane: int, control: DepthControl | None = None) -> None:
        """Take a free lane, whatever was in it before. `control`: one row, as
        `dial.depth_control(lm, params, 1, ...)` makes it."""
        row = self._neutral if control is None else _row(control)
        self._state = self._compiled.open(self._state, np.int32(lane), row)
        self._lengths[lane] = Lengths(0, 0)
        self._queued[lane] = 0
        self._lives[lane] += 1

    def prefill(self, lane: int, tokens: Sequence[int]) -> Ticket:
        """Append 1 .. max(chunks) tokens at the lane's current length, all of a prompt but its last
        one. The smallest program that holds them runs. `fetch()` of the ticket gives a
        `Prefilled`."""
        count = len(tokens)
        if not 1 <= count <= self.chunks[-1]:
            raise UserError(
                f"a chunk has 1 to {self.chunks[-1]} tokens, got {count}; cut the prompt (`Device.cut`)."
            )
        self._queue(lane, count)
        size = next(c for c in self.chunks if c >= count)
        padded = np.zeros((size,), np.int32)
        padded[:count] = tokens
        program = self._compiled.prefills[size]
        self._state, chunk = program(
            self._weights, self._state, np.int32(lane), padded, np.int32(count)
        )
        life = self._lives[lane]

        def read(chunk: Chunk) -> Prefilled:
            lengths = Lengths(int(chunk.tokens), int(chunk.entries))
            if life == self._lives[lane]:
                self._lengths[lane] = lengths
            return Prefilled(np.asarray(chunk.depth_C)[:count], lengths, bool(chunk.fits))

        return Ticket(chunk, read)

    def start(self, lane: int, token: int, row: DrawRows, remaining: int) -> None:
        """Decode from the end of the next tick on: `token`, the last of the prompt, enters first,
        and up to `remaining` tokens are drawn. `row`: of `rows.host_row`. Raises UserError where
        the context does not hold them."""
        self._queue(lane, remaining)  # the last drawn token does not enter
        self._state = self._compiled.start(
            self._state,
            np.int32(lane),
            np.int32(token),
            np.int32(remaining),
            _row_of(self._state.draws, row),
        )

    def _queue(self, lane: int, count: int) -> None:
        if self._queued[lane] + count > self.context:
            raise UserError(
                f"{self._queued[lane]} tokens and {count} more are beyond the engine's context of {self.context}."
            )
        self._queued[lane] += count

    def stop(self, lane: int) -> None:
        """Free the lane, whatever it is doing. Ticks already dispatched say nothing of it any
        more."""
        self._state = self._compiled.stop(self._state, np.int32(lane))
        self._lives[lane] += 1

    def put_mask(self, lane: int, mask_W: np.ndarray, position: int) -> None:
        """The tokens a grammar allows at `position`; the lane waits at the boundary until it is
        there."""
        mask_W = np.asarray(mask_W, np.uint32)
        self._state = self._compiled.mask(self._state, np.int32(lane), mask_W, np.int32(position))

    def tick(self) -> Ticket:
        """Dispatch one tick (or `ticks_per_dispatch`). `fetch()` of the ticket gives a list of
        `Ticked`; of a tick that speculates, one for each token of the span, NONE in those a lane
        did not come to."""
        self._state, out = self._compiled.tick(self._weights, self._state)
        lives = list(self._lives)

        def read(out: Out) -> list[Ticked]:
            if self.config.speculate:
                self.drafted += self.config.speculate * int(np.sum(out.token_N[0] != NONE))
                self.accepted += int(np.sum(out.token_N[1:] != NONE))
            return [
                self._ticked(Out(*(leaf[i] for leaf in out)), lives)
                for i in range(out.passes.shape[0])
            ]

        return Ticket(out, read)

    def _ticked(self, out: Out, lives: list[int]) -> Ticked:
        same_N = np.asarray(lives) == np.asarray(self._lives)
        for lane in np.flatnonzero(same_N):
            self._lengths[lane] = Lengths(int(out.tokens_N[lane]), int(out.entries_N[lane]))

        fetched = jax.tree.map(np.asarray, out)._replace(
            token_N=np.where(same_N, out.token_N, NONE),
            stopped_N=out.stopped_N & same_N,
            ended_N=out.ended_N & same_N,
            starved_N=out.starved_N & same_N,
            passes=int(out.passes),
            rows=int(out.rows),
            exits=int(out.exits),
        )
        return Ticked._make(fetched)

    # ------------------------------------------------------------------------------------- rows of
    # a prefix

    def save(self, lane: int, start: Lengths, stop: Lengths) -> Rows:
        """Copy entries start .. stop out of a lane that holds them."""
        pieces = []
        for part, first, last in (
            ("ends", start.tokens, stop.tokens),
            ("core", start.entries, stop.entries),
        ):
            for slot in range(first, last, PIECE):
                arrays = self._compiled.save[part](self._state, np.int32(lane), np.int32(slot))
                pieces.append(Piece(part, slot, min(PIECE, last - slot), arrays))
        return Rows(start, stop, tuple(pieces))

    def load(self, lane: int, rows: Rows) -> None:
        """Append saved rows to a lane that holds `rows.start` entries: those of the whole path from
        the root of the tree, in order. They must fit (`rows.stop` within `capacity`)."""
        for part, slot, count, arrays in rows.pieces:
            load = self._compiled.load[part]
            self._state = load(self._state, np.int32(lane), np.int32(slot), np.int32(count), arrays)
        self._lengths[lane], self._queued[lane] = rows.stop, rows.stop.tokens

    # ------------------------------------------------------------------------------------- sizes

    def cut(self, count: int) -> list[int]:
        """Chunk lengths for so many tokens: the largest as long as it fits, then the next ones;
        what is left below the smallest is a chunk of its own. By the count alone, so that the same
        prompt always runs the same programs.
        """
        out = []
        for size in reversed(self.chunks):
            out += [size] * (count // size)
            count %= size
        return out + [count] * (count > 0)

    def capacity(self, lane: int) -> Lengths:
        """Room of a lane."""
        return Lengths(self.context, self.shape.entries[lane])

    def lengths(self, lane: int) -> Lengths:
        """Entries in use, as of the ticket fetched last."""
        return self._lengths[lane]

    def expected_entries(self, tokens: int, mean_depth: float | None = None) -> int:
        """Entries of the core log that so many tokens take, at the expected depth or this one."""
        return expected_entries(self.lm, self.shares, tokens, mean_depth)

    def bytes_per_sequence(self, tokens: int, entries: int | None = None) -> int:
        """Bytes of keys and values of a sequence; `entries` of the core log: the expected number by
        default."""
        entries = self.expected_entries(tokens) if entries is None else entries
        _, kv_heads, head_dim = self.lm.model.dims
        one = 2 * kv_heads * head_dim * jnp.dtype(self.lm.model.dtype).itemsize
        p = self.lm.program
        return one * (tokens * (p.prelude + p.coda) + entries * p.core * p.repeat)

    def lane_bytes(self, lane: int) -> int:
        """Bytes that the lane's logs take, full or not."""
        return self.bytes_per_sequence(self.context, self.shape.entries[lane])

    @property
    def memory_bytes(self) -> int:
        """Bytes of the logs of all lanes."""
        return sum(self.lane_bytes(lane) for lane in range(self.lanes))


def expected_entries(
    lm: LM, shares: Sequence[float], tokens: int, mean_depth: float | None = None
) -> int:
    """Entries of the core log that so many tokens take, at the expected depth or this one."""
    if lm.depth.kv_name == SHARED:
        return tokens
    depth = choose.mean_depth(shares) if mean_depth is None else mean_depth
    return int(np.ceil(tokens * min(depth, lm.program.recursions)))


def shape_of(lm: LM, config: EngineConfig, shares: Sequence[float]) -> Shape:
    """The room of each lane, for tokens of which these shares run each step."""
    context = config.context or lm.model.context
    most = context * (1 if lm.depth.kv_name == SHARED else lm.program.recursions)
    expected = int(expected_entries(lm, shares, context) * SLACK) + SPARE
    full = min(config.full_lanes, config.lanes)
    spare = min(most, config.entries or expected)
    return Shape(context, (most,) * full + (spare,) * (config.lanes - full))


def _row(control: DepthControl) -> DepthControl:
    """The one row of a control, on the host."""
    dial, floor, cap = (np.asarray(leaf)[0] for leaf in control)
    return DepthControl(dial.astype(np.float32), floor.astype(np.int32), cap.astype(np.int32))


def _row_of(rows: DrawRows, row: DrawRows) -> DrawRows:
    """`row` in the types of `rows`."""
    return jax.tree.map(lambda all_, one: np.asarray(one, all_.dtype), rows, row)


def can_serve(lm: LM) -> bool:
    """Whether the engine computes this model."""
    own = lm.recursion.reads or lm.recursion.exits or lm.policy.halts or lm.policy.reenters
    return not (own or lm.program.networks > 1 or lm.model.bidirectional)


def check_sizes(lm: LM, c: EngineConfig) -> None:
    """Raise UserError: sizes that cannot be, or a model that the engine does not compute."""
    most = lm.model.context
    if not can_serve(lm):
        raise UserError(
            "the batching engine applies the core to states alone, but this model's config.recursion sets what else a step "
            "reads (state, injection, conditioning, loop_norm) or an exit rule, or its depth policy halts tokens by "
            "their states or lets them come back. Decode it with "
            "mor_jax.inference.engine.plain.PlainService, or launch.generate, which does."
        )
    if c.lanes < 1 or c.full_lanes < 1:
        raise UserError(
            f"an engine needs at least one lane, and one with full room; got lanes = {c.lanes}, full_lanes = {c.full_lanes}."
        )
    if not 0 <= c.context <= most:
        raise UserError(
            f"the engine's context of {c.context} tokens must be at most the model's, {most}."
        )
    if not c.chunks or min(c.chunks) < 1:
        raise UserError(f"prefill needs chunk sizes of at least 1 token, got {c.chunks}.")
    if c.boundary_every is not None and not 1 <= c.boundary_every <= lm.program.recursions:
        raise UserError(
            f"boundary_every must be from 1 to the model's recursions, {lm.program.recursions}; got {c.boundary_every}."
        )
    if c.speculate < 0 or (c.speculate and not 1 <= c.draft_depth < lm.program.recursions):
        raise UserError(
            f"speculation drafts at least one token with fewer recursions than the model's {lm.program.recursions}; "
            f"got speculate = {c.speculate}, draft_depth = {c.draft_depth}. speculate = 0 does without."
        )
    if c.speculate and c.ticks_per_dispatch > 1:
        raise UserError("a tick that speculates is one dispatch: set ticks_per_dispatch to 1.")
    if c.entries < 0 or c.ticks_per_dispatch < 1 or c.max_logprobs < 0:
        raise UserError(
            "entries and max_logprobs must not be negative, ticks_per_dispatch at least 1."
        )


__all__ = [
    "Device",
    "EngineConfig",
    "Lengths",
    "Prefilled",
    "Rows",
    "Ticked",
    "Ticket",
    "can_serve",
]
