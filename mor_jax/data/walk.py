"""The walk task: follow pointers to their end, one hop a recursion step.

A forest of disjoint chains over N nodes. Token i is the parent of node i, a root is its own parent;
then comes the node to start from, then the root of its chain, the answer. One application of a core
can follow one pointer, so a start at distance D from its root needs D of them, and more change
nothing: the task shows whether a recursion runs on past the depth of training, and whether it knows
when it is done. Every row is made from a seed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Walks(NamedTuple):
    """B rows of T = N + 2 tokens. The answer is predicted at position N."""

    tokens_BxT: np.ndarray  # int32, ids 0..N-1
    steps_BxM: np.ndarray  # int32, where the walk is after 1..M hops
    distance_B: np.ndarray  # hops from start to root

    @property
    def root_B(self) -> np.ndarray:
        """The answers."""
        return self.tokens_BxT[:, -1]

    def batch(self) -> dict[str, np.ndarray]:
        """As a training step reads them: the loss is at the start node alone, and its target after
        recursion step t is the node after t hops."""
        rows, length = self.tokens_BxT.shape
        weights = np.zeros((rows, length), np.float32)
        weights[:, -1] = 1
        targets = np.zeros((rows, length, self.steps_BxM.shape[1]), np.int32)
        targets[:, -2] = self.steps_BxM
        ones = np.ones((rows, length), np.int32)
        return {
            "tokens": self.tokens_BxT,
            "segment_ids": ones,
            "weights": weights,
            "step_targets": targets,
        }


def walks(
    seed: int | tuple[int, ...], rows: int, nodes: int, distances: tuple[int, ...], hops: int
) -> Walks:
    """Random forests and starts.

    Args:
      seed: rows are a function of it.
      nodes: N.
      distances: of the start from its root; each row draws one of them. At most N - 1.
      hops: M.
    Raises:
      ValueError: a distance that no chain of N nodes has.
    """
    if not distances or min(distances) < 0 or max(distances) >= nodes:
        raise ValueError(f"distances must lie in 0..{nodes - 1} for {nodes} nodes, got {distances}")
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(nodes, dtype=np.int32), (rows, 1)), axis=1)
    distance = rng.choice(np.asarray(distances, np.int32), rows)
    # Along `order`, a node hangs on the one before it, unless a chain begins there. The first chain
    # is the start's: it is cut off somewhere after the start. Elsewhere every second node is a
    # root: with few roots, guessing one is easy.
    index = np.arange(nodes)
    end = rng.integers(distance + 1, nodes + 1)[:, None]
    begins = (index == 0) | (index == end) | ((index > end) & (rng.random((rows, nodes)) < 0.5))
    above = np.where(begins, order, np.roll(order, 1, axis=1))
    parent = np.empty_like(order)
    np.put_along_axis(parent, order, above, axis=1)
    at, steps = order[np.arange(rows), distance], []
    start = at
    for _ in range(hops):
        at = parent[np.arange(rows), at]
        steps.append(at)
    tokens = np.concatenate([parent, start[:, None], order[:, :1]], axis=1)
    return Walks(tokens.astype(np.int32), np.stack(steps, axis=1).astype(np.int32), distance)
