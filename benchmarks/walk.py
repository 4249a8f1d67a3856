"""Recursion past the depth of training, and exact halting, on the walk task
(`mor_jax/data/walk.py`).

    python -m benchmarks.walk --seeds 0,1,2

Trains one small shared block (64 wide) three ways on walks of at most 5 hops at 8 recursions: with
a loss after each recursion and the input injected at each ("steps"), without the injection
("no_inject"), and with the loss at the end alone ("final"). It prints the share of exact answers
after 1..24 recursions on walks of trained and of longer distance, and where a zero-shot exit rule
(divergence between steps) stops: one recursion past the distance, if the model knows that it is
done. "guess" is what a model gets that looks one hop far and draws among the roots that another
node points to; beside a long chain of 12 nodes few are left, or none.

Learning is a change of phase (after 300 to 600 steps the loss falls within 100), so a shorter run
shows nothing. What makes it come early and stay: biases and norms of queries and keys, since a
pointer is found by its position; rotary frequencies of a row this short; an embedding of size 1
beside the normalised states; a learning rate that falls over half of the run.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import record
from mor_jax.config import Config, ModelConfig, OptimConfig, RecursionConfig, TrainConfig, check
from mor_jax.data.walk import Walks, walks
from mor_jax.model.lm import CAUSAL, LM
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import TrainState
from mor_jax.train.step import make_train_step

NODES, RECURSIONS, TRAINED, LONGER = 12, 8, (1, 2, 3, 4, 5), (6, 7, 8, 9, 10)
DEPTHS = (1, 2, 4, 6, 8, 12, 16, 24)
GROUPS = {"distance 2-5": (2, 3, 4, 5), "distance 6-8": (6, 7, 8), "distance 9-10": (9, 10)}
KINDS = {
    "steps": {"injection": "concat", "loss": "uniform"},
    "no_inject": {"loss": "uniform"},
    "final": {"injection": "concat"},
}
EXIT = {"exit": "kl", "exit_threshold": 0.1}

_STEPS = flags.DEFINE_integer("steps", 1000, "Optimiser steps of each run.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "One run of each kind for each.")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), "What to train.")
_ROWS = flags.DEFINE_integer("rows", 256, "Test walks of each distance.")
_OUT = flags.DEFINE_string("out", "benchmarks/results/walk_cpu.json", "Where the numbers go.")


def config(kind: str, steps: int) -> Config:
    """The configuration of one run."""
    model = ModelConfig(
        layers=RECURSIONS,
        recursions=RECURSIONS,
        sharing="cycle",
        width=64,
        heads=4,
        kv_heads=4,
        mlp_width=176,
        vocab_size=NODES,
        context=NODES + 2,
        rope_theta=10.0,
        qkv_bias=True,
        qk_norm=True,
        norm_placement="sandwich_out",
        tied=False,
        init_std=0.06,
    )
    optim = OptimConfig(peak_lr=1.5e-3, warmup=0.03, decay=0.5, b2=0.98, weight_decay=0.01)
    train = TrainConfig(steps=steps, batch_size=64)
    cfg = Config(
        name=kind, model=model, recursion=RecursionConfig(**KINDS[kind]), optim=optim, train=train
    )
    check(cfg)
    return cfg


def initial(lm: LM, seed: int) -> dict[str, Any]:
    """Parameters before training, embeddings of standard deviation 1: the states they are added to
    have that size after each step, and without a prelude nothing else would give it to them."""
    params = jax.jit(lm.init)(jax.random.key(seed))
    table = params["embed"]["table"] / lm.model.init_std
    return params | {"embed": params["embed"] | {"table": table}}


def trained(cfg: Config, seed: int) -> tuple[LM, dict[str, Any]]:
    """(model, parameters) after the run."""
    lm, tx = LM.from_config(cfg), optimizer_of(cfg, cfg.train.steps)
    params = initial(lm, seed)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    step, began = jax.jit(make_train_step(lm, tx), donate_argnums=0), time.monotonic()
    for n in range(cfg.train.steps):
        rows = walks((seed, n), cfg.train.batch_size, NODES, TRAINED, RECURSIONS).batch()
        if not lm.recursion.trains:
            del rows["step_targets"]
        state, metrics = step(state, rows)
        if n % 100 == 0 or n + 1 == cfg.train.steps:
            seconds = time.monotonic() - began
            print(
                f"{cfg.name} seed {seed} step {n}: loss {float(metrics['loss']):.3f}, {seconds:.0f} s",
                flush=True,
            )
    return lm, state.params


@functools.partial(jax.jit, static_argnums=0)
def answers(lm: LM, params: dict[str, Any], tokens_BxT: jax.Array) -> jax.Array:
    """Answer [S, B] at the start node of each row after each of the model's recursions."""
    tokens = tokens_BxT[:, :-1]
    _, h_SxBxTxD = lm.unroll(params, tokens, jnp.ones_like(tokens))
    return jnp.argmax(lm.logits(params, h_SxBxTxD[:, :, -1]), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def stopped(lm: LM, params: dict[str, Any], tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(answer, recursions run) [B] at the start node of each row, under the model's exit rule."""
    out = lm.forward(params, tokens_BxT[:, :-1], mode=CAUSAL)
    return jnp.argmax(lm.logits(params, out.h_BxTxD[:, -1]), axis=-1), out.depth_BxT[:, -1]


def measured(lm: LM, params: dict[str, Any], tests: dict[int, Walks]) -> dict[str, Any]:
    """Exact answers by recursions and distance, and where the exit rule stops."""

    def with_knobs(**knobs: Any) -> LM:
        return dataclasses.replace(
            lm.at_depth(max(DEPTHS)), recursion=dataclasses.replace(lm.recursion, **knobs)
        )

    every, early = with_knobs(loss="uniform"), with_knobs(**EXIT)
    exact: dict[int, dict[int, float]] = {depth: {} for depth in DEPTHS}
    exits: dict[int, dict[str, float]] = {}
    for distance, test in tests.items():
        said_SxB = np.asarray(answers(every, params, test.tokens_BxT))
        for depth in DEPTHS:
            exact[depth][distance] = float((said_SxB[depth - 1] == test.root_B).mean())
        answer_B, ran_B = (np.asarray(x) for x in stopped(early, params, test.tokens_BxT))
        exits[distance] = {
            "mean": float(ran_B.mean()),
            "at_distance_plus_1": float((ran_B == distance + 1).mean()),
            "exact": float((answer_B == test.root_B).mean()),
        }
    return {"exact": exact, "exit": exits}


def guess(test: Walks) -> float:
    """Share of exact answers of one who draws a root that another node points to."""
    parents_BxN = test.tokens_BxT[:, :NODES]
    own_BxN = parents_BxN == np.arange(NODES)
    pointed_BxN = (parents_BxN[:, :, None] == np.arange(NODES)) & ~own_BxN[:, :, None]
    return float((1 / (own_BxN & pointed_BxN.any(axis=1)).sum(axis=1)).mean())


def mean(by: dict[int, float], group: tuple[int, ...]) -> float:
    """Over these distances."""
    return float(np.mean([by[distance] for distance in group]))


def table(found: dict[str, Any], guesses: dict[int, float]) -> str:
    """The numbers of one run as text."""
    lines = ["recursions   " + "".join(f"{r:>7}" for r in DEPTHS) + "  guess"]
    for name, group in GROUPS.items():
        shares = "".join(f"{mean(found['exact'][r], group):7.3f}" for r in DEPTHS)
        lines.append(f"{name:<13}{shares}{mean(guesses, group):7.3f}")
    exits = found["exit"]
    lines.append(
        "exits by distance  " + ", ".join(f"{d}: {e['mean']:.1f}" for d, e in exits.items())
    )
    on_time, right = (
        mean({d: e[key] for d, e in exits.items()}, (*TRAINED, *LONGER))
        for key in ("at_distance_plus_1", "exact")
    )
    lines.append(f"exit at distance + 1: {on_time:.3f}, exact there: {right:.3f}")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    out = Path(_OUT.value)
    record.claim(out)
    tests = {
        d: walks((10**6, d), _ROWS.value, NODES, (d,), RECURSIONS) for d in (*TRAINED, *LONGER)
    }
    guesses, runs = {d: guess(test) for d, test in tests.items()}, []
    for seed in map(int, _SEEDS.value):
        for kind in _KINDS.value:
            lm, params = trained(config(kind, _STEPS.value), seed)
            of_run = {"kind": kind, "seed": seed, "commit": record.commit()}
            runs.append(of_run | measured(lm, params, tests))
            print(f"\n{kind}, seed {seed}\n{table(runs[-1], guesses)}\n", flush=True)
            record.write(
                out,
                {
                    "processor": record.processor(),
                    "cores": record.cores(),
                    "jax": jax.__version__,
                    "steps": _STEPS.value,
                    "guess": guesses,
                    "runs": runs,
                },
            )


if __name__ == "__main__":
    app.run(main)
