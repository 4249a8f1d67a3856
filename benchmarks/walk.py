"""Recursion past the depth of training, and exact halting, on the walk task
(`mor_jax/data/walk.py`).

    python -m benchmarks.walk --out walk.json

Trains one small shared block (64 wide) three ways on walks of at most 5 hops at 8 recursions: with
a loss after each recursion and the input injected at each ("steps"), without the injection
("no_inject"), and with the loss at the end alone ("final"). It prints the share of exact answers at
1..24 recursions on walks of trained and of longer distance, and where a zero-shot exit rule
(divergence between steps) stops: one recursion past the distance, if the model knows that it is
done. One run of 1200 steps ("steps", seed 0) did not get there: 0.6 of the answers at distances
2-5. At distances 6-10 of 12 nodes few roots are left to guess from, so compare with one over their
number.
"""

import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mor_jax.config import Config, ModelConfig, OptimConfig, RecursionConfig, TrainConfig, check
from mor_jax.data.walk import Walks, walks
from mor_jax.model.lm import CAUSAL, LM
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import TrainState
from mor_jax.train.step import make_train_step

NODES, RECURSIONS, TRAINED, LONGER = 12, 8, (1, 2, 3, 4, 5), (6, 7, 8, 9, 10)
DEPTHS = (1, 2, 4, 6, 8, 12, 16, 24)
KINDS = {
    "steps": {"injection": "concat", "loss": "uniform"},
    "no_inject": {"loss": "uniform"},
    "final": {"injection": "concat"},
}
EXIT = {"exit": "kl", "exit_threshold": 0.1}

_STEPS = flags.DEFINE_integer("steps", 1200, "Optimiser steps of each run.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "One run of each kind for each.")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), "What to train.")
_ROWS = flags.DEFINE_integer("rows", 512, "Test walks of each distance.")
_OUT = flags.DEFINE_string("out", None, "A .json file for the numbers.")


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
        rope_theta=100.0,
        norm_placement="sandwich_out",
        tied=False,
        init_std=0.06,
    )
    optim = OptimConfig(peak_lr=2e-3, warmup=0.03, decay=0.2, weight_decay=0.01)
    train = TrainConfig(steps=steps, batch_size=64)
    cfg = Config(
        name=kind, model=model, recursion=RecursionConfig(**KINDS[kind]), optim=optim, train=train
    )
    check(cfg)
    return cfg


def trained(cfg: Config, seed: int) -> tuple[LM, Any]:
    """(model, parameters) after the run."""
    lm, tx = LM.from_config(cfg), optimizer_of(cfg, cfg.train.steps)
    params = jax.jit(lm.init)(jax.random.key(seed))
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
def answers(lm: LM, params: Any, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(answer, recursions run) at the start node of each row, under the model's exit rule if it has
    one."""
    out = lm.forward(params, tokens_BxT[:, :-1], mode=CAUSAL)
    return jnp.argmax(lm.logits(params, out.h_BxTxD[:, -1]), axis=-1), out.depth_BxT[:, -1]


def measured(lm: LM, params: Any, tests: dict[int, Walks]) -> dict[str, Any]:
    """Exact answers by recursions and distance, and where the exit rule stops."""
    exact: dict[int, dict[int, float]] = {}
    for depth in DEPTHS:
        at = lm.at_depth(depth)
        said = {d: np.asarray(answers(at, params, t.tokens_BxT)[0]) for d, t in tests.items()}
        exact[depth] = {d: float((said[d] == t.root_B).mean()) for d, t in tests.items()}
    recursion = dataclasses.replace(lm.recursion, **EXIT)
    early = dataclasses.replace(lm.at_depth(max(DEPTHS)), recursion=recursion)
    stops, right = {}, {}
    for d, t in tests.items():
        answer, ran = (np.asarray(x) for x in answers(early, params, t.tokens_BxT))
        right[d] = float((answer == t.root_B).mean())
        stops[d] = {"mean": float(ran.mean()), "at_distance_plus_1": float((ran == d + 1).mean())}
    return {"exact": exact, "exit": stops, "exit_exact": right}


def table(found: dict[str, Any]) -> str:
    """The numbers of one run as text."""

    def of(by, group):
        return float(np.mean([by[d] for d in group]))

    lines = ["recursions   " + "".join(f"{r:>7}" for r in DEPTHS)]
    for name, group in (("distance 2-5", TRAINED[1:]), ("distance 6-10", LONGER)):
        lines.append(
            f"{name:<13}" + "".join(f"{of(found['exact'][r], group):7.3f}" for r in DEPTHS)
        )
    exits = ", ".join(f"{d}: {e['mean']:.1f}" for d, e in found["exit"].items())
    lines.append(f"exits by distance  {exits}")
    on_time = of(
        {d: e["at_distance_plus_1"] for d, e in found["exit"].items()}, (*TRAINED, *LONGER)
    )
    lines.append(
        f"exit at distance + 1: {on_time:.3f}, exact there: {of(found['exit_exact'], (*TRAINED, *LONGER)):.3f}"
    )
    return "\n".join(lines)


def main(_: list[str]) -> None:
    tests = {
        d: walks((10**6, d), _ROWS.value, NODES, (d,), RECURSIONS) for d in (*TRAINED, *LONGER)
    }
    record = []
    for seed in map(int, _SEEDS.value):
        for kind in _KINDS.value:
            lm, params = trained(config(kind, _STEPS.value), seed)
            record.append(
                {"kind": kind, "seed": seed, "steps": _STEPS.value, **measured(lm, params, tests)}
            )
            print(f"\n{kind}, seed {seed}\n{table(record[-1])}\n", flush=True)
            if _OUT.value:
                with open(_OUT.value, "w", encoding="utf-8") as f:
                    json.dump(record, f, indent=1)


if __name__ == "__main__":
    app.run(main)
