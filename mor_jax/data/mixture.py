"""The order of training rows: of one source, and of several in one stream, each with its share
(`config.data.mixture`).

Each epoch of a source is a permutation of its own. Shares are kept exactly over every CYCLE rows:
of each cycle every source has a fixed number of places, spread evenly. So which source and which of
its rows stands at position n of the stream follows from n alone, as the loader needs it; the rows
of each source are shuffled on their own, anew each time all of them have been read.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from mor_jax.data.packing import Row

# Below this, grain's shuffle, which walks a 16-bit permutation until it lands inside the data set,
# takes up to milliseconds an index (3.9 ms at 10 rows, 3 µs at 100,000); an explicit permutation is
# cheap there.
SMALL = 1 << 15  # rows


class Order:
    """`order[i]`: row at position i. Each epoch of `rows` positions is a permutation of its own,
    fixed by `seed`."""

    def __init__(self, rows: int, seed: int):
        self._rows, self._seed = rows, seed
        self._stream = (
            None if rows < SMALL else grain.MapDataset.range(rows).seed(seed).shuffle().repeat()
        )

    def __getitem__(self, position: int) -> int:
        if self._stream is not None:
            return int(self._stream[position])
        epoch, at = divmod(position, self._rows)
        return int(_permutation(self._rows, self._seed, epoch)[at])


@functools.lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    # Raw Philox output is the same in every version of numpy; Generator.permutation does not
    # promise that.
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(rows), kind="stable")


CYCLE = 1000  # rows: shares are multiples of 1 / CYCLE, and a source has at least one place


def cycle(weights: Sequence[float]) -> np.ndarray:
    """The source of each place of a cycle, int [CYCLE]. Shares are rounded to whole places by
    largest remainders."""
    share = np.asarray(weights, np.float64) / sum(weights) * CYCLE
    places = np.maximum(1, np.floor(share)).astype(int)
    while (rest := CYCLE - int(places.sum())) > 0:
        places[np.argmax(share - places)] += 1
    for _ in range(-rest):  # small sources have been given a place
        places[np.argmax(np.where(places > 1, places - share, -np.inf))] -= 1
    at = [((j + 0.5) / count, source) for source, count in enumerate(places) for j in range(count)]
    return np.array([source for _, source in sorted(at)])


class Mixture(Sequence[Row]):
    """The rows of all sources, one source after another.

    Args:
      parts: rows of each source, of one context.
      weights: positive; what share of the stream's rows each source has.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]):
        self._parts, self._weights = tuple(parts), tuple(weights)
        # of each source, and the end
        self.first = [0, *itertools.accumulate(len(part) for part in parts)]
        self.context = parts[0].context

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, i: int) -> Row:  # type: ignore[override]  # no slices
        return self.read([i])[0]

    def read(self, indices: Sequence[int]) -> list[Row]:
        """Several rows, those of each source at once."""
        found: dict[int, Row] = {}
        places = [bisect.bisect_right(self.first, i) - 1 for i in indices]
        for source in set(places):
            mine = [k for k, place in enumerate(places) if place == source]
            rows = self._parts[source].read([indices[k] - self.first[source] for k in mine])
            found |= dict(zip(mine, rows, strict=True))
        return [found[k] for k in range(len(indices))]

    def order(self, seed: int) -> MixedOrder:
        """The endless stream."""
        return MixedOrder([len(part) for part in self._parts], self._weights, seed)

    def fair(self) -> list[int]:
        """All rows once, in the shares of the mixture as long as there are rows of each source: for
        evaluations, which read the first so many."""
        sizes = [len(part) for part in self._parts]
        of_cycle, taken = cycle(self._weights), [0] * len(sizes)
        result: list[int] = []
        for source in itertools.cycle(of_cycle):
            if len(result) == len(self):
                return result
            if taken[source] < sizes[source]:
                result.append(self.first[source] + taken[source])
                taken[source] += 1
        return result


class MixedOrder:
    """`order[n]`: row of a `Mixture` at position n of the endless stream."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int):
        self._cycle = cycle(weights)
        self._first = [0, *itertools.accumulate(sizes)]
        self._orders = [Order(size, seed) for size in sizes]
        self._places = np.bincount(self._cycle, minlength=len(sizes))
        # Of each place of a cycle: how many of its source stand before it.
        seen = np.zeros(len(sizes), int)
        self._before = np.empty(CYCLE, int)
        for place, source in enumerate(self._cycle):
            self._before[place] = seen[source]
            seen[source] += 1

    def source(self, position: int) -> int:
        """Which source's row stands there."""
        return int(self._cycle[position % CYCLE])

    def __getitem__(self, position: int) -> int:
        turn, place = divmod(position, CYCLE)
        source = int(self._cycle[place])
        return (
            self._first[source]
            + self._orders[source][int(turn * self._places[source] + self._before[place])]
        )


class Picked(Sequence[Row]):
    """Rows in another order."""

    def __init__(self, rows: Mixture, indices: Sequence[int]):
        self._rows, self._indices, self.context = rows, indices, rows.context

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Row:  # type: ignore[override]  # no slices
        return self._rows[self._indices[i]]

    def read(self, indices: Sequence[int]) -> list[Row]:
        return self._rows.read([self._indices[i] for i in indices])
