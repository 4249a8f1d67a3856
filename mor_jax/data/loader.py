"""Batches by step number. B: rows a global batch, T: tokens a row.

The position in the data is a function of the step and of nothing else, so a run resumes at any step
on any number of hosts and sees the same rows.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mor_jax.data.mixture import Order
from mor_jax.data.packing import Row
from mor_jax.errors import DataError

Batch = dict[str, Any]  # {"tokens": int32[B, T], "segment_ids": int32[B, T]}, numpy or jax arrays
PREFETCH = 2  # batches


class Loader:
    """Training batches: step s is positions [s*B, (s+1)*B) of the rows, shuffled anew each epoch,
    without end.

    Args:
      rows: anything with `len()` and `[i] -> {"tokens": int32[T], "segment_ids": int32[T]}`; with
        `order(seed)`, in an order of its own (`data.mixture`).
      batch_size: B, over all hosts. May exceed the number of rows; they repeat.
      seed: of the shuffle.
      sharding: of [B, T] arrays. With it, batches are global jax arrays of which each host reads
        only its own rows; without it, numpy arrays.

    Raises:
      DataError: there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        *,
        seed: int,
        sharding: jax.sharding.Sharding | None = None,
    ):
        if not len(rows):
            raise DataError("there are no training rows; is the corpus empty?")
        if batch_size < 1:
            raise DataError(f"the batch size must be at least 1 row, got {batch_size}.")
        self._rows, self._batch_size, self._sharding = rows, batch_size, sharding
        self._shape = (batch_size, _width(rows))
        self._order = rows.order(seed) if hasattr(rows, "order") else Order(len(rows), seed)

    def indices_at(self, step: int, positions: Iterable[int] | None = None) -> list[int]:
        """Row numbers of a batch, or of some positions 0..B-1 in it."""
        first = step * self._batch_size
        return [
            self._order[first + int(i)]
            for i in (range(self._batch_size) if positions is None else positions)
        ]

    def at(self, step: int) -> Batch:
        """The batch of a step."""

        def read(positions: np.ndarray) -> Batch:
            return _stack(_read(self._rows, self.indices_at(step, positions)))

        return _place(read, self._shape, self._sharding)

    def iter_from_step(self, step: int) -> Generator[Batch, None, None]:
        """`at(step)`, `at(step + 1)`, ... read ahead by a thread, which ends when the iterator is
        closed."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH)
        stop = threading.Event()
        thread = threading.Thread(
            target=self._read_ahead, args=(step, ready, stop), name="prefetch", daemon=True
        )
        thread.start()
        try:
            while True:
                batch = ready.get()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            with contextlib.suppress(queue.Empty):
                while True:
                    ready.get_nowait()  # makes room, should the thread be waiting for it
            thread.join()

    def _read_ahead(
        self, step: int, ready: queue.Queue[Batch | BaseException], stop: threading.Event
    ) -> None:
        while not stop.is_set():
            batch: Batch | BaseException
            try:
                batch = self.at(step)
            except BaseException as e:  # handed over, raised where the batch was wanted
                batch = e
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(batch, timeout=0.1)
                    break
            if isinstance(batch, BaseException):
                return
            step += 1


def eval_batches(
    rows: Sequence[Row],
    batch_size: int,
    *,
    limit: int = 0,
    sharding: jax.sharding.Sharding | None = None,
) -> Iterator[Batch]:
    """Batches in order from row 0, without shuffling; the last is filled up with rows whose
    segment_ids are all 0.

    limit: rows to read; 0: all. Every host yields the same number of batches."""
    total = min(limit or len(rows), len(rows))
    for first in range(0, total, batch_size):

        def read(at: np.ndarray, first: int = first) -> Batch:
            found = _read(rows, [i for i in first + at if i < total])
            blank = {
                name: np.zeros_like(array)
                for name, array in (found[0] if found else rows[0]).items()
            }
            return _stack([*found, *[blank] * (len(at) - len(found))])

        yield _place(read, (batch_size, _width(rows)), sharding)


def _place(
    read: Callable[[np.ndarray], Batch],
    shape: tuple[int, int],
    sharding: jax.sharding.Sharding | None,
) -> Batch:
    """The [B, T] batch that `read` gives for sorted positions in 0..B; with `sharding`, reading
    only this host's.

    Devices that hold the same rows (replicas, tensor parallelism) and the two arrays share one
    read."""
    positions = np.arange(shape[0])
    if sharding is None:
        return read(positions)
    held = sharding.addressable_devices_indices_map(shape)
    needed = np.unique(np.concatenate([positions[index[0]] for index in held.values() if index]))
    local = read(needed)

    def array(name: str) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "of an array with axes"
            return local[name][np.searchsorted(needed, positions[index[0]])][:, index[1]]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: array(name) for name in local}


def _read(rows: Sequence[Row], indices: Sequence[int]) -> list[Row]:
    """Several rows, at once where `rows` can (`Rows.read`)."""
    indices = [int(i) for i in indices]
    return rows.read(indices) if hasattr(rows, "read") else [rows[i] for i in indices]


def _stack(rows: Sequence[Row]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _width(rows: Sequence[Row]) -> int:
    return rows.context if hasattr(rows, "context") else rows[0]["tokens"].shape[0]
