"""Results of a `Device`: tickets for dispatched work, and the values they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np


class Lengths(NamedTuple):
    """Entries in use: one a token in prelude and coda, and those of the core's log."""

    tokens: int
    entries: int


class Prefilled(NamedTuple):
    """`fits` False: the core log has no room for the chunk, so nothing was written, and nothing will be by later
    prefills of this lane. It needs a lane with more room."""

    depth_T: np.ndarray
    lengths: Lengths
    fits: bool


class Ticked(NamedTuple):
    """One tick, [lanes]. A lane that was stopped since the tick was dispatched says nothing.

    token_N: NONE (-1): nothing was drawn. depth_N: recursions that were run to draw it. stopped_N: it is one of the
    stop tokens. ended_N: the lane draws no more, by a stop token or because `remaining` ran out. starved_N: the lane
    stands still since its core log is full; nothing is lost, it needs a lane with more room. passes: core passes that
    ran; rows: lanes that ran, summed over them; exits: lanes that left through the boundary.
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
    """Saved entries slot .. slot + count of one part ("ends" or "core"), in arrays with room for PIECE of them."""

    part: str
    slot: int
    count: int
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
