"""TRM against a one-step gradient and CGAR's curriculum, on Sudoku of 4 x 4 cells
(`mor_jax/data/sudoku.py`).

    python -m benchmarks.sudoku --seeds 0

One small network that sees all cells, two states, 12 updates a segment, at most 4 segments, one
optimiser step after each (`mor_jax/train/segments.py`), 8000 puzzles of 5 to 12 clues. "trm" has
the gradient of the last round of a segment, "one_step" of the last update of each state (as in HRM,
with TRM's one network), "cgar" runs (n, t) = (1, 1), (2, 2) and (3, 3) for 30, 30 and 40 % of the
steps and weighs early segments more; "last" is trained without deep supervision: one segment of 12
updates, and that is all it has. It prints exact answers on puzzles of other grids after 1..8
segments, updates run in training, and seconds.
"""

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import record
from mor_jax.config import ModelConfig, OptimConfig, RecursionConfig
from mor_jax.config.check_model import check_model
from mor_jax.config.recursion import check_recursion
from mor_jax.data.sudoku import CELLS, VOCABULARY, Puzzles, puzzles
from mor_jax.model.lm import LM
from mor_jax.train import segments as by_segments
from mor_jax.train.schedule import optimizer
from mor_jax.train.state import TrainState

SEGMENTS, TESTED, INNER, ROUNDS = 4, 8, 3, 3
EASIEST = 12  # clues of a training puzzle, at most
CURRICULUM = ((0.0, 1, 1), (0.3, 2, 2), (0.6, 3, 3))  # from this share of the steps on: (n, t)
KINDS: dict[str, dict[str, Any]] = {
    "trm": {},
    "one_step": {"window": 2},
    "cgar": {"stages": CURRICULUM, "decay": 0.7},
    "last": {"segments": 1},
}

_STEPS = flags.DEFINE_integer("steps", 800, "Optimiser steps of each run.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "One run of each kind for each.")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), "What to train.")
_CLUES = flags.DEFINE_integer("clues", 5, "Given cells of a tested puzzle, at least.")
_PUZZLES = flags.DEFINE_integer("puzzles", 1000, "Training puzzles of each number of clues.")
_ROWS = flags.DEFINE_integer("rows", 128, "Puzzles of a step.")
_OUT = flags.DEFINE_string(
    "out", str(record.ROOT / "benchmarks" / "results" / "sudoku_cpu.json"), "Where the numbers go."
)


def model(inner: int, rounds: int, window: int = 0) -> LM:
    """The network with so many updates of z before each of y, and so many rounds a segment.
    `window`: updates with a gradient; 0: those of the last round."""
    updates = (inner + 1) * rounds
    shape = ModelConfig(
        layers=2 * updates,
        recursions=updates,
        sharing="cycle",
        width=64,
        heads=4,
        kv_heads=4,
        mlp_width=176,
        vocab_size=VOCABULARY,
        context=CELLS,
        norm_placement="post",
        qk_norm=True,
        tied=False,
        init_std=0.1,
        attention="xla",
        bidirectional=True,
    )
    recursion = RecursionConfig(
        state="drawn", injection="add", inner=inner, gradient_steps=window or inner + 1
    )
    lm = LM(shape, recursion=recursion)
    check_model(shape)
    check_recursion(recursion, shape, lm.depth)
    return lm


def stages(kind: str, steps: int) -> list[tuple[int, LM]]:
    """(first optimiser step, model) of each stage."""
    how = KINDS[kind]
    return [
        (round(share * steps), model(n, t, how.get("window", 0)))
        for share, n, t in how.get("stages", ((0.0, INNER, ROUNDS),))
    ]


def trained(kind: str, seed: int, steps: int, data: Puzzles) -> tuple[Any, dict[str, float]]:
    """(averaged parameters, what it took)."""
    how, plan = KINDS[kind], stages(kind, steps)
    lm = plan[-1][1]
    tx = optimizer(OptimConfig(peak_lr=1e-3, warmup=0.05, decay=0.3, weight_decay=0.1), steps)
    params = jax.jit(functools.partial(by_segments.init, lm))(jax.random.key(seed))
    # as large as the normed states that it is added to, as in TRM
    params["embed"]["table"] /= lm.model.init_std
    state = TrainState(
        jnp.zeros((), jnp.int32), params, tx.init(params), jax.tree.map(jnp.copy, params)
    )
    rng = np.random.default_rng((seed, 1))

    def batch() -> dict[str, np.ndarray]:
        return data.batch(rng.integers(len(data.tokens_BxT), size=_ROWS.value))

    carry, updates, seconds = by_segments.begin(lm, batch()), 0, 0.0
    for (first, lm), last in zip(plan, [*(n for n, _ in plan[1:]), steps], strict=True):
        step = (
            jax.jit(
                by_segments.make_segment_step(
                    lm,
                    tx,
                    segments=how.get("segments", SEGMENTS),
                    decay=how.get("decay", 1.0),
                    ema=0.99,
                )
            )
            .lower(state, carry, batch())
            .compile()
        )
        began = time.monotonic()
        for n in range(first, last):
            state, carry, metrics = step(state, carry, batch())
            updates += lm.program.recursions
            if n % 100 == 0 or n + 1 == steps:
                told = ", ".join(f"{k} {float(v):.3f}" for k, v in metrics.items())
                print(f"{kind} seed {seed} step {n}: {told}", flush=True)
        jax.block_until_ready(state)
        seconds += time.monotonic() - began
    return state.average, {"updates": updates, "seconds": seconds}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _solved(lm: LM, params: Any, batch: Any, segments: int) -> tuple[jax.Array, jax.Array]:
    return by_segments.solve(lm, params, batch, segments)


def measured(params: Any, test: Puzzles) -> dict[str, Any]:
    """Exact answers after each segment, and where the halting head would stop."""
    lm = model(INNER, ROUNDS)
    right_SxB, z_SxB = (
        np.asarray(x)
        for x in _solved(lm, params, test.batch(np.arange(len(test.tokens_BxT))), TESTED)
    )
    at_B = np.where((z_SxB > 0).any(axis=0), (z_SxB > 0).argmax(axis=0), TESTED - 1)
    return {
        "exact": {s + 1: float(right_SxB[s].mean()) for s in range(TESTED)},
        "halted": {
            "segments": float(at_B.mean() + 1),
            "exact": float(right_SxB[at_B, np.arange(right_SxB.shape[1])].mean()),
        },
    }


def mixed(seed: int) -> Puzzles:
    """Training puzzles, easy and hard: of hard ones alone nothing is learned (docs/family.md)."""
    parts = [
        puzzles((seed, clues), _PUZZLES.value, clues) for clues in range(_CLUES.value, EASIEST + 1)
    ]
    return Puzzles(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def main(_: list[str]) -> None:
    out = Path(_OUT.value)
    record.claim(out)
    runs = []
    test = puzzles((10**6, 1), 512, _CLUES.value, held_out=True)
    for seed in map(int, _SEEDS.value):
        data = mixed(seed)
        for kind in _KINDS.value:
            params, took = trained(kind, seed, _STEPS.value, data)
            runs.append({"kind": kind, "seed": seed, **took, **measured(params, test)})
            print(f"\n{runs[-1]}\n", flush=True)
            record.write(
                out,
                {
                    "processor": record.processor(),
                    "cores": record.cores(),
                    "commit": record.commit(),
                    "jax": jax.__version__,
                    "steps": _STEPS.value,
                    "clues": _CLUES.value,
                    "puzzles": _PUZZLES.value,
                    "runs": runs,
                },
            )


if __name__ == "__main__":
    app.run(main)
