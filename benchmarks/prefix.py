"""What the prefix cache is worth to a fan of sub-calls: many short prompts behind one long head,
with and without it.

    python -m benchmarks.prefix  # 1,000 calls of 40 tokens behind 800; some minutes
    python -m benchmarks.prefix --shape tiny --calls 50      # does the command itself run?

All calls are submitted at once, as an RLM does, to an engine of eight lanes that is warm; a
Mixture-of-Recursions model with random weights. The runs take turns; every run begins with an empty
cache. Both say the same, token for token, which is checked. The table shows seconds, calls and
drawn tokens a second, prompt tokens that went through the model, hits, and when a call got its
first token and its last.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from launch import cli
from mor_jax.config import DTYPES, DepthConfig, MeshConfig, ModelConfig
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.request import Drawing, Finished, Request, Token
from mor_jax.inference.engine.service import EngineService, ServiceConfig
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.loop import mesh_device, versions

SHAPES = {
    "tiny": {
        "layers": 5,
        "width": 32,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 48,
        "vocab_size": 64,
    },
    "small": {
        "layers": 8,
        "width": 256,
        "heads": 4,
        "kv_heads": 2,
        "mlp_width": 768,
        "vocab_size": 8192,
    },
    "cpu": {
        "layers": 29,
        "width": 576,
        "heads": 9,
        "kv_heads": 3,
        "mlp_width": 1536,
        "vocab_size": 49152,
    },
}
PATIENCE_S = 3600.0

_SHAPE = flags.DEFINE_enum("shape", "small", list(SHAPES), "Shape of the model; see above.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of weights, keys and values.")
_CALLS = flags.DEFINE_integer("calls", 1000, "Sub-calls.", lower_bound=1)
_HEAD = flags.DEFINE_integer("head", 800, "Tokens that all prompts begin with.", lower_bound=1)
_TAIL = flags.DEFINE_integer("tail", 40, "Tokens of each prompt behind them.", lower_bound=1)
_NEW = flags.DEFINE_integer("new", 16, "Tokens drawn for each call.", lower_bound=1)
_LANES = flags.DEFINE_integer("lanes", 8, "Sequences decoded at once.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 1, "Runs of each, in turns; the table shows medians.", lower_bound=1
)
_OUT = flags.DEFINE_string(
    "out", None, "Result; default benchmarks/results/prefix_<device>_<shape>_<dtype>.json."
)


class Run(NamedTuple):
    """One run of all calls. Seconds; tokens."""

    seconds: float
    computed_tokens: float
    hit_tokens: float
    first_token_s: list[float]  # since all calls were submitted
    last_token_s: list[float]
    said: list[tuple[int, ...]]


def build(shape: str, dtype: str, context: int, lanes: int) -> Device:
    """An engine that is warm."""
    model = ModelConfig(
        sharing="middle_cycle", recursions=3, context=context, dtype=dtype, **SHAPES[shape]
    )
    lm = LM(model, DepthConfig("expert_choice"))
    params = jax.jit(lm.init)(jax.random.key(0))
    device = Device(lm, params, EngineConfig(lanes=lanes, boundary_every=1))
    device.warm_up()
    return device


def prompts(calls: int, head: int, tail: int, vocab: int) -> list[tuple[int, ...]]:
    """Random token ids."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, vocab, head).tolist()
    return [(*start, *rng.integers(0, vocab, tail).tolist()) for _ in range(calls)]


def run(device: Device, calls: list[tuple[int, ...]], new: int, prefix_bytes: int | None) -> Run:
    """All calls at once through an engine whose cache is empty."""
    service = EngineService(
        device, ServiceConfig(queue=len(calls), prefix_bytes=prefix_bytes, idle_s=PATIENCE_S)
    )
    said: list[list[int]] = [[] for _ in calls]
    first, last = [0.0] * len(calls), [0.0] * len(calls)
    left, done, errors = [len(calls)], threading.Event(), []
    begin = time.perf_counter()

    def listen(i: int, events: list) -> None:
        now = time.perf_counter() - begin
        for event in events:
            if isinstance(event, Token):
                first[i] = first[i] or now
                said[i].append(event.id)
            elif isinstance(event, Finished):
                if event.error is not None:
                    errors.append(event.error)
                last[i] = now
                left[0] -= 1
                if not left[0]:
                    done.set()

    for i, prompt in enumerate(calls):
        service.submit(
            Request(prompt, new, Drawing(temperature=0.0)), lambda events, i=i: listen(i, events)
        )
    if not done.wait(PATIENCE_S) or errors:
        raise RuntimeError(f"the calls did not end as they should: {errors[:1] or 'too slow'}")
    seconds, stats = time.perf_counter() - begin, service.stats()
    service.close()
    return Run(
        seconds,
        stats["prefill_tokens_total"],
        stats["prefix_cache_hits_total"],
        first,
        last,
        list(map(tuple, said)),
    )


def summary(runs: list[Run], calls: int, new: int) -> dict[str, Any]:
    """Medians over the rounds; of first and last tokens, over all calls of all rounds."""
    seconds = statistics.median(r.seconds for r in runs)
    firsts, lasts = (
        np.concatenate([r.first_token_s for r in runs]),
        np.concatenate([r.last_token_s for r in runs]),
    )
    return {
        "seconds": seconds,
        "rounds_seconds": [r.seconds for r in runs],
        "calls_per_s": calls / seconds,
        "drawn_tokens_per_s": calls * new / seconds,
        "prompt_tokens_computed": runs[0].computed_tokens,
        "prompt_tokens_found": runs[0].hit_tokens,
        "first_token_s": {f"p{q}": float(np.percentile(firsts, q)) for q in (50, 99)},
        "last_token_s": {f"p{q}": float(np.percentile(lasts, q)) for q in (50, 99)},
    }


def show(result: dict[str, Any], console: Console) -> None:
    table = Table(
        box=box.SIMPLE,
        title=f"{result['calls']} calls: {result['head']} shared + {result['tail']} own tokens",
    )
    for column in (
        "prefix cache",
        "seconds",
        "calls/s",
        "drawn tok/s",
        "computed",
        "found",
        "first p50",
        "last p99",
    ):
        table.add_column(column, justify="right")
    for name in ("with", "without"):
        r = result[name]
        table.add_row(
            name,
            f"{r['seconds']:.2f}",
            f"{r['calls_per_s']:.1f}",
            f"{r['drawn_tokens_per_s']:.0f}",
            f"{r['prompt_tokens_computed']:.0f}",
            f"{r['prompt_tokens_found']:.0f}",
            f"{r['first_token_s']['p50']:.2f} s",
            f"{r['last_token_s']['p99']:.2f} s",
        )
    console.print(table)
    console.print(
        f"With the cache {result['gain']:.2f} times as many calls a second.", markup=False
    )


def main(_: list[str]) -> None:
    calls, new = _CALLS.value, _NEW.value
    name = record.slug(jax.devices()[0].device_kind)
    default = (
        record.ROOT / "benchmarks" / "results" / f"prefix_{name}_{_SHAPE.value}_{_DTYPE.value}.json"
    )
    out = Path(_OUT.value) if _OUT.value else default
    record.claim(out)
    tell = Console(stderr=True)
    tell.print("compiling")
    context = -(-(_HEAD.value + _TAIL.value + new) // 64) * 64
    device = build(_SHAPE.value, _DTYPE.value, context, _LANES.value)
    asked = prompts(calls, _HEAD.value, _TAIL.value, device.draw_config.vocab_size)
    load, begin = record._busy(), time.process_time()
    runs: dict[str, list[Run]] = {"with": [], "without": []}
    for i in range(_ROUNDS.value):
        order = list(runs) if i % 2 == 0 else list(runs)[::-1]
        for which in order:
            tell.print(f"round {i + 1} of {_ROUNDS.value}: {which} the cache")
            runs[which].append(run(device, asked, new, None if which == "with" else 0))
    if len({tuple(r.said) for r in (*runs["with"], *runs["without"])}) != 1:
        raise RuntimeError("with and without the cache the calls did not say the same")
    after, own = record._busy(), time.process_time() - begin
    result: dict[str, Any] = {
        "benchmark": "prefix",
        "time": record.now(),
        "commit": record.commit(),
        "device": mesh_device(make_mesh(MeshConfig())),
        "machine": platform.machine(),
        "processor": record.processor(),
        "cores": record.cores(),
        "versions": versions(),
        "shape_name": _SHAPE.value,
        "shape": SHAPES[_SHAPE.value],
        "dtype": _DTYPE.value,
        "engine": dataclasses.asdict(device.config),
        "calls": calls,
        "head": _HEAD.value,
        "tail": _TAIL.value,
        "new": new,
        **{which: summary(found, calls, new) for which, found in runs.items()},
    }
    result["gain"] = result["without"]["seconds"] / result["with"]["seconds"]
    if load and after:
        result["others_share_of_cores"] = max(
            0.0, (after[0] - load[0] - own) / (after[1] - load[1])
        )
    show(result, Console())
    record.write(out, result)
    print(f"Written: {out}")


if __name__ == "__main__":
    cli.run(main)
