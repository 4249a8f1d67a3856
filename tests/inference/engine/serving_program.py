"""Serves each kind of model on one simulated device and on several; prints what was drawn, where
the arrays lie and what was sent, as JSON. Run by test_serving_mesh.py.

Eight devices have to be asked for before JAX starts, hence a process of its own.
"""

import json
import sys

import jax
import numpy as np
from driving import GREEDY, Job, fill, play, prompts
from kinds import ALL_FEATURES
from small import random_params, small_lm, spread_routers

from mor_jax.analysis.collectives import read_collectives
from mor_jax.inference.engine.device import Device, EngineConfig, Lengths
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import host_row
from mor_jax.inference.engine.scoring import Scorer
from mor_jax.parallel.serving import serving_mesh

SHAPE = dict(width=16, heads=8, kv_heads=8, head_dim=4, mlp_width=32, context=48, vocab_size=64)
ROUTED = dict(layers=3, recursions=2, sharing="cycle", prelude=1)
KINDS = {
    "vanilla": ("vanilla", dict(layers=1)),
    "expert": ("mor", ROUTED),
    "token": ("token", ROUTED | dict(layers=2, prelude=0)),
    # queries alone are projected after the first step
    "features": ("mor_shared", ROUTED | ALL_FEATURES),
}
# kind -> sizes of `tensor`, format of the weights. Any other is run by its name, e.g. "token 8
# compute".
CASES = {
    "vanilla": ((1, 2), "compute"),
    "expert": ((1, 8), "compute"),
    "token": ((1, 4), "compute"),
    "features": ((1, 8), "int8"),
}


def device(kind: str, tensor: int, weights: str) -> Device:
    name, shape = KINDS[kind]
    lm = small_lm(name, **SHAPE | shape)
    config = EngineConfig(
        lanes=4, chunks=(8,), full_lanes=4, max_logprobs=2, boundary_every=1, weights=weights
    )
    params = spread_routers(random_params(lm))
    made = Device(lm, params, config, mesh=serving_mesh(f"tensor={tensor}", lm.model))
    made.warm_up()
    return made


def jobs() -> list[Job]:
    """Greedy and sampled, prompts of several chunks, arrivals while others decode."""
    warm = Drawing(temperature=0.9, seed=3, top_p=0.9, repetition_penalty=1.2)
    drawings = (GREEDY, Drawing(temperature=1.0, seed=1), warm, GREEDY)
    lengths, arrivals = (7, 20, 1, 12), (0, 0, 2, 3)
    rows = zip(prompts(0, *lengths), range(4), arrivals, drawings, strict=True)
    return [Job(p, 10, lane, at, how, None, 2) for p, lane, at, how in rows]


def from_saved_rows(d: Device) -> list[int]:
    """The second job again: its prompt is prefilled in one lane, saved, and loaded in another."""
    job = jobs()[1]
    fill(d, job._replace(lane=0))
    end = Lengths(len(job.prompt) - 1, d.lengths(0).entries)
    saved = d.save(0, Lengths(0, 0), end)
    d.stop(0)
    d.open(2)
    d.load(2, saved)
    row = host_row(job.drawing, d.draw_config, prompt=job.prompt, logprobs=2)
    d.start(2, job.prompt[-1], row, job.new)
    out = []
    while len(out) < job.new:
        out += [int(t.token_N[2]) for t in d.tick().fetch() if t.token_N[2] >= 0]
    d.stop(2)
    return out


def scores(d: Device) -> list[float | None]:
    scorer = Scorer(d.lm, None, chunk=8, mesh=d.placement.mesh, weights=d.weights, max_logprobs=2)
    return scorer.score(jobs()[1].prompt).logprobs[1:]


def sent(program, tensor: int) -> dict[str, list[int]]:
    """Bytes of the arrays that each kind of collective sums or joins."""
    found: dict[str, list[int]] = {}
    for c in read_collectives(program.as_text(), {"tensor": tensor}):
        found.setdefault(c.kind, []).extend([c.payload] * c.times)
    return {kind: sorted(sizes) for kind, sizes in found.items()}


def run(kind: str, tensor: int, weights: str) -> dict:
    d = device(kind, tensor, weights)
    played = play(d, jobs())
    state = d._state
    logs = [
        x
        for part in (state.prelude, state.core, state.coda)
        for log in part
        for x in (*log.k, *log.v)
    ]
    return {
        "tokens": [p.tokens for p in played],
        "depths": [p.prompt_depths + p.depths for p in played],
        "logprobs": [p.logprobs for p in played],
        "from saved rows": from_saved_rows(d),
        "scores": scores(d) if kind == "features" else [],
        "shares of weights": {
            jax.tree_util.keystr(path): _share(x)
            for path, x in jax.tree_util.tree_leaves_with_path(d.weights)
        },
        "shares of logs": [_share(x) for x in logs],
        "bytes of weights": sum(x.nbytes for x in jax.tree.leaves(d.weights)),
        "tick": sent(d._programs.tick, tensor),
        "prefill": sent(d._programs.prefills[8], tensor),
    }


def _share(x: jax.Array) -> float:
    """Of an array, on each device that has some of it."""
    return float(np.prod(x.sharding.shard_shape(x.shape)) / x.size)


if __name__ == "__main__":
    names = [f"{kind} {n} {how}" for kind, (sizes, how) in CASES.items() for n in sizes]
    cases = {name: name.split() for name in sys.argv[1:] or names}
    print(json.dumps({name: run(kind, int(n), how) for name, (kind, n, how) in cases.items()}))
