"""Sudoku of 4 x 4 cells: puzzles with one solution, made from a seed, with grids that no training
puzzle comes from.

A token names a cell and what stands in it, 5 * cell + digit, digit 0 where nothing does; an answer
is the digit. There are 288 grids; `HELD_OUT` of each eight in a shuffled list are for tests.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import numpy as np

SIDE, CELLS, DIGITS = 4, 16, 5  # the fifth digit, 0, is an empty cell
VOCABULARY = CELLS * DIGITS
HELD_OUT = 2
FEWEST_CLUES = 4  # that determine a grid


class Puzzles(NamedTuple):
    """B puzzles of T = 16 cells, row by row."""

    tokens_BxT: np.ndarray  # int32, below VOCABULARY
    answers_BxT: np.ndarray  # int32, 1..4
    weights_BxT: np.ndarray  # float32: 1 at empty cells, else 0

    def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """These rows as `train/segments.py` reads them."""
        names = ("tokens", "answers", "weights")
        return {name: x[index] for name, x in zip(names, self, strict=True)}


@functools.cache
def grids() -> np.ndarray:
    """Every solved grid, [288, 16] int32: each row, column and square of four has each of 1..4."""
    rows = list(itertools.permutations(range(1, SIDE + 1)))
    found = [np.array(four).reshape(-1) for four in itertools.product(rows, repeat=SIDE)]
    all_NxRxC = np.stack(found).reshape(-1, SIDE, SIDE).astype(np.int32)
    squares = all_NxRxC.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, SIDE, SIDE)
    want = np.arange(1, SIDE + 1)

    def full(groups: np.ndarray) -> np.ndarray:
        return (np.sort(groups, axis=-1) == want).all(axis=(1, 2))

    return all_NxRxC[full(all_NxRxC.swapaxes(1, 2)) & full(squares)].reshape(-1, CELLS)


def _grids_of(held_out: bool) -> np.ndarray:
    every = grids()
    order = np.random.default_rng(0).permutation(len(every))
    return every[order[(np.arange(len(every)) % 8 < HELD_OUT) == held_out]]


def puzzles(
    seed: int | tuple[int, ...], rows: int, clues: int = 6, held_out: bool = False
) -> Puzzles:
    """Puzzles that have one solution each.

    Args:
      seed: rows are a function of it.
      clues: cells that are given, at least; cells are emptied in a random order as long as one
        solution remains, so a puzzle may be left with more.
      held_out: of the grids kept for tests.
    Raises:
      ValueError: fewer clues than determine any grid, or more than there are cells.
    """
    if not FEWEST_CLUES <= clues <= CELLS:
        raise ValueError(f"clues must be from {FEWEST_CLUES} to {CELLS}, got {clues}")
    rng, every, own = np.random.default_rng(seed), grids(), _grids_of(held_out)
    answers = own[rng.integers(len(own), size=rows)]
    given = np.ones((rows, CELLS), bool)
    for grid, mask in zip(answers, given, strict=True):
        same = every == grid
        for cell in rng.permutation(CELLS):
            mask[cell] = False
            if mask.sum() < clues or same[:, mask].all(axis=1).sum() > 1:
                mask[cell] = True
    tokens = DIGITS * np.arange(CELLS) + np.where(given, answers, 0)
    return Puzzles(tokens.astype(np.int32), answers, (~given).astype(np.float32))
