"""Continuous depth-wise batching: what it gains, what it should gain, and what the memory holds.

    python -m benchmarks.decode                     # ten minutes on two quiet cores
    python -m benchmarks.decode --shape tiny        # does the command itself run?
    python -m benchmarks.decode --checkpoint RUN    # also a trained router, in its own shape

First table: for every case (vocabulary, length of the core: they set rho = T_h / T_b) and every
distribution of depths, tokens a second at m = 1 (depth-wise), every m between, and m = R
(lock-step), all lanes busy, beside the prediction from T_b and T_h measured alone
(`mor_jax/inference/engine/choose.py` says how); full depth; and the vanilla engine of as many
unrolled layers. The ticks of every m take turns on the very same lanes, a few ticks each, there and
back; medians of the turns. Depths are forced by data (`benchmarks/forced_depth.py`), in the same
compiled programs.

Second table: bytes of keys and values of a sequence, and how many sequences a fixed memory holds.

Third: the published throughput protocol (arXiv 2507.10524, 3.3 and appendix E): no prompt, about
256 tokens a sequence, a finished sequence is replaced at once, four recursions against the vanilla
engine of as many layers, at 32 sequences and at as many as equal KV memory holds. Unlike there,
everything is in the timing: KV writes, drawing, and putting new sequences into lanes.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.forced_depth import ForcedLM, with_shares
from launch import cli
from mor_jax.config import DTYPES, DepthConfig, MeshConfig, ModelConfig
from mor_jax.errors import UserError
from mor_jax.inference.engine import choose
from mor_jax.inference.engine.device import Device, EngineConfig
from mor_jax.inference.engine.request import Drawing
from mor_jax.inference.engine.rows import host_row
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.load import load_model
from mor_jax.train.loop import mesh_device, versions


class Size(NamedTuple):
    """A shape: width, heads, kv heads, mlp width; the cases of the first table as (vocabulary, core
    blocks); lanes; tokens a sequence; the protocol's core blocks, vocabulary, lanes and tokens;
    ticks of a turn; turns before each measurement of T_b and T_h, of which there are two."""

    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    cases: tuple[tuple[int, int], ...]
    lanes: int
    tokens: int
    protocol: tuple[int, int, int, int]
    ticks: int
    turns: int


SHAPES = {
    "tiny": Size(64, 4, 2, 96, ((128, 2),), 4, 64, (1, 128, 4, 24), 4, 1),
    "cpu": Size(
        576, 9, 3, 1536, ((512, 9), (512, 3), (49152, 9)), 8, 256, (8, 49152, 32, 256), 8, 4
    ),
    "360m": Size(
        960, 15, 5, 2560, ((512, 10), (49152, 10), (49152, 3)), 32, 512, (8, 49152, 32, 256), 24, 5
    ),
}
DISTRIBUTIONS = {
    "uniform": (1.0, 2 / 3, 1 / 3),  # the paper's capacities, too: what a balanced router gives
    "front-heavy": (1.0, 0.5, 0.2),
    "late": (1.0, 0.9, 0.8),
    "full depth": (1.0, 1.0, 1.0),
}
PAPER_4 = (1.0, 0.75, 0.5, 0.25)
PAPER_GAIN = 2.06  # four recursions at the largest batch, KV writes excluded there
SPREAD = 32  # tokens, standard deviation of a sequence's length

_SHAPE = flags.DEFINE_enum("shape", "cpu", list(SHAPES), "Shape of the models; see above.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of weights, keys and values.")
_LANES = flags.DEFINE_integer(
    "lanes", None, "Lanes of the first table instead of the shape's.", lower_bound=1
)
_PARTS = flags.DEFINE_list("parts", ["depths", "protocol"], "Any of depths, protocol.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Also a trained model: its run directory.")
_OUT = flags.DEFINE_string(
    "out", None, "Result; default benchmarks/results/decode_<device>_<shape>_<dtype>.json."
)


def forced(
    size: Size, vocab: int, core: int, recursions: int, context: int, dtype: str
) -> ForcedLM:
    """One block, `core` shared ones run `recursions` times, one block; depths forced."""
    return ForcedLM(
        _model(size, vocab, 2 + core * recursions, context, dtype, recursions),
        DepthConfig("expert_choice"),
    )


def vanilla(size: Size, vocab: int, layers: int, context: int, dtype: str) -> LM:
    """As many layers, each its own."""
    return LM(_model(size, vocab, layers, context, dtype, 1))


def _model(
    size: Size, vocab: int, layers: int, context: int, dtype: str, recursions: int
) -> ModelConfig:
    sharing = "middle_cycle" if recursions > 1 else "none"
    return ModelConfig(
        layers=layers,
        recursions=recursions,
        sharing=sharing,
        width=size.width,
        heads=size.heads,
        kv_heads=size.kv_heads,
        mlp_width=size.mlp_width,
        vocab_size=vocab,
        context=context,
        dtype=dtype,
    )


class Bench:
    """A device whose ticks of several m take turns on the same lanes, always full."""

    def __init__(
        self, lm: LM, params: Any, lanes: int, ms: Sequence[int], *, full: int, entries: int = 0
    ):
        config = EngineConfig(
            lanes=lanes, chunks=(1,), boundary_every=ms[0], full_lanes=full, entries=entries
        )
        self.device = Device(lm, params, config)
        # What is timed, and no more: prompts are a token long, so that nothing is prefilled.
        self._made = self.device.uncompiled()
        self.ticks = {}
        for m in ms:
            self._made.compile_tick(m, 1)
            self.ticks[m] = self._made.tick
        self._made.compile_small()
        self.device.use(self._made)
        self._row = host_row(Drawing(temperature=0.0), self.device.draw_config, prompt=())
        self._rng = np.random.default_rng(0)
        self.starved = 0

    def place(self, lane: int, tokens: int) -> None:
        """A new sequence of so many tokens, without a prompt."""
        self.device.open(lane)
        self.device.start(
            lane, int(self._rng.integers(self.device.draw_config.vocab_size)), self._row, tokens
        )

    def turn(self, m: int, ticks: int, length: Callable[[], int]) -> tuple[float, int, np.ndarray]:
        """(seconds, tokens drawn, their depths counted) of ticks of m passes, read one behind; a
        lane that ends gets a new sequence at once."""
        self._made.tick = self.ticks[m]
        drawn, depths, before = 0, np.zeros(self.device.recursions + 1, int), None
        begin = time.perf_counter()
        for i in range(ticks + 1):
            ticket = self.device.tick() if i < ticks else None
            for done in before.fetch() if before else []:
                got = done.token_N >= 0
                drawn += int(got.sum())
                depths += np.bincount(done.depth_N[got], minlength=len(depths))
                self.starved += int(done.starved_N.sum())
                for lane in np.flatnonzero(done.ended_N | done.starved_N):
                    self.place(lane, length())
            before = ticket
        return time.perf_counter() - begin, drawn, depths


def turns(bench: Bench, size: Size) -> tuple[dict[int, list[float]], np.ndarray]:
    """(tokens a second of every turn by m, how many tokens had each depth) over the life of the
    lanes' sequences."""
    lanes, tokens = bench.device.lanes, size.tokens
    starts = itertools.cycle(range(tokens // 4, tokens, max(1, tokens // 7)))
    for lane in range(lanes):  # ends scattered over time, logs of every length
        bench.place(lane, next(starts))
    rates: dict[int, list[float]] = {m: [] for m in bench.ticks}
    depths = np.zeros(bench.device.recursions + 1, int)
    for m in bench.ticks:
        bench.turn(m, max(4, tokens // 16), lambda: tokens - 1)  # fill the logs, settle
    for i in range(size.turns):
        order = list(bench.ticks) if i % 2 == 0 else list(reversed(bench.ticks))
        for m in order:
            # A tick of small m draws fewer tokens, so it gets more of them.
            seconds, drawn, found = bench.turn(
                m, size.ticks * -(-bench.device.recursions // m), lambda: tokens - 1
            )
            rates[m].append(drawn / seconds)
            depths += found
    return rates, depths


def one_case(
    name: str, bench: Bench, params: Any, shares: dict[str, tuple | None], size: Size, tell
) -> list[dict]:
    """Rows of the first table: one a distribution (None: the model's own router)."""
    device, rows = bench.device, []
    probes = device.probes()
    for label, wanted in shares.items():
        tell(f"{name}: {label}")
        if wanted is not None:
            device.set_params(with_shares(params, wanted))
        # Twice, each time with what the prediction is made of behind it: a machine that changes
        # meanwhile changes both.
        rates: dict[int, list[float]] = {m: [] for m in bench.ticks}
        times, depths, half = [], 0, size.tokens // 2
        for _ in range(2):
            new, counted = turns(bench, size)
            rates = {m: rates[m] + new[m] for m in rates}
            depths = depths + counted
            found = (np.cumsum(depths[::-1])[::-1] / max(depths.sum(), 1))[1:].tolist()
            entries = min(device.expected_entries(half, sum(found)), device.shape.entries[-1])
            times.append(device.measure(probes, half, entries))
        rates = {m: statistics.median(of) for m, of in rates.items()}
        core_s, boundary_s = (statistics.mean(of) for of in zip(*times, strict=True))
        predicted = {
            m: choose.throughput(device.lanes, found, m, core_s, boundary_s) for m in bench.ticks
        }
        best = choose.best(device.lanes, found, core_s, boundary_s)
        rows.append(
            {
                "case": name,
                "depths": label,
                "lanes": device.lanes,
                "recursions": device.recursions,
                "shares": found,
                "mean_depth": sum(found),
                "core_ms": core_s * 1e3,
                "boundary_ms": boundary_s * 1e3,
                "rho": boundary_s / core_s,
                "best_m": best,
                "tokens_per_s": rates,
                "predicted": predicted,
                "of_predicted": {m: rates[m] / predicted[m] for m in rates},
                "gain_over_lock_step": rates[best] / rates[device.recursions],
                "bytes_per_sequence": device.bytes_per_sequence(
                    size.tokens, device.expected_entries(size.tokens, sum(found))
                ),
            }
        )
    return rows


def depths_part(size: Size, lanes: int, dtype: str, tell: Callable[[str], None]) -> list[dict]:
    """All rows of forced depths, and vanilla's."""
    rows = []
    for vocab, core in size.cases:
        name = f"V={vocab} core={core}"
        tell(f"{name}: compiling")
        lm = forced(size, vocab, core, 3, size.tokens, dtype)
        params = jax.jit(lm.init)(jax.random.key(0))
        bench = Bench(lm, params, lanes, (1, 2, 3), full=lanes)
        rows += one_case(name, bench, params, DISTRIBUTIONS, size, tell)
        del bench
        tell(f"{name}: compiling vanilla")
        plain = vanilla(size, vocab, 2 + 3 * core, size.tokens, dtype)
        bench = Bench(plain, jax.jit(plain.init)(jax.random.key(0)), lanes, (1,), full=lanes)
        rows += one_case(name, bench, None, {"vanilla": None}, size, tell)
        del bench, params
    return rows


def trained_part(path: str, size: Size, lanes: int, tell: Callable[[str], None]) -> list[dict]:
    """The rows of a checkpoint, under its own router."""
    loaded = load_model(path)
    tokens = min(size.tokens, loaded.lm.model.context)
    steps = tuple(range(1, loaded.lm.program.recursions + 1))
    bench = Bench(loaded.lm, loaded.params, lanes, steps, full=lanes)
    return one_case(
        loaded.config.name,
        bench,
        None,
        {"trained router": None},
        size._replace(tokens=tokens),
        tell,
    )


def protocol_part(size: Size, dtype: str, tell: Callable[[str], None]) -> list[dict]:
    """Rows of the throughput protocol."""
    core, vocab, lanes, tokens = size.protocol
    longest = tokens + 4 * SPREAD
    rng = np.random.default_rng(0)

    def length():
        return int(np.clip(rng.normal(tokens, SPREAD), 1, longest))

    plain, mor = (
        vanilla(size, vocab, 2 + 4 * core, longest, dtype),
        forced(size, vocab, core, 4, longest, dtype),
    )
    rows, memory = [], 0
    for name, lm, batches in (("vanilla", plain, (lanes,)), ("mor-4", mor, (lanes, 0))):
        params = jax.jit(lm.init)(jax.random.key(0))
        params = with_shares(params, PAPER_4) if lm is mor else params
        for batch in batches:
            entries = int(longest * sum(PAPER_4) * 1.1) if lm is mor else longest
            one = _sequence_bytes(lm, longest, entries)
            memory = memory or lanes * one
            batch = batch or max(lanes, int(memory // one))
            tell(f"protocol: {name}, {batch} lanes: compiling")
            ms = (1, 2, 4) if lm is mor else (1,)
            bench = Bench(lm, params, batch, ms, full=1, entries=entries)
            for lane in range(batch):
                bench.place(lane, 1 + int(rng.integers(longest)))
            found = {m: [] for m in ms}
            for m in ms:
                bench.turn(m, tokens // 4, length)
            for i, m in itertools.product(range(3), ms):
                tell(f"protocol: {name}, {batch} lanes, m = {m}, turn {i + 1} of 3")
                seconds, drawn, _ = bench.turn(
                    m, tokens // 4 * -(-lm.program.recursions // m) // 2, length
                )
                found[m].append(drawn / seconds)
            rates = {m: statistics.median(r) for m, r in found.items()}
            rows.append(
                {
                    "model": name,
                    "lanes": batch,
                    "bytes_per_sequence": one,
                    "kv_bytes": batch * one,
                    "tokens_per_s": rates,
                    "starved": bench.starved,
                }
            )
            del bench
    base = rows[0]["tokens_per_s"][1]
    for row in rows:
        row["over_vanilla"] = {m: rate / base for m, rate in row["tokens_per_s"].items()}
    return rows


def _sequence_bytes(lm: LM, tokens: int, entries: int) -> int:
    _, kv_heads, head_dim = lm.model.dims
    one = (
        2
        * kv_heads
        * head_dim
        * np.dtype("float32").itemsize
        // (1 if lm.model.dtype == "float32" else 2)
    )
    return one * (tokens * (lm.program.prelude + lm.program.coda) + entries * lm.program.core)


# ------------------------------------------------------------------------------------- showing


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right")
    return table


def show(result: dict[str, Any], console: Console) -> None:
    """The tables, and what they say."""
    if rows := result.get("depths"):
        table = _table(
            f"tokens/s, {result['lanes']} lanes, measured (of predicted)",
            "case",
            "depths",
            "E\\[d]",
            "T_b ms",
            "T_h ms",
            "rho",
            "m = 1",
            "m = 2",
            "lock-step",
            "best m",
            "over lock-step",
        )
        for row in rows:

            def cell(m, row=row):
                return f"{row['tokens_per_s'][m]:.0f} ({row['of_predicted'][m]:.0%})"

            top = row["recursions"]
            routed = top > 1
            table.add_row(
                row["case"],
                row["depths"],
                f"{row['mean_depth']:.2f}",
                f"{row['core_ms']:.2f}",
                f"{row['boundary_ms']:.2f}",
                f"{row['rho']:.2f}",
                cell(1),
                cell(2) if top > 2 else "",
                cell(top) if routed else "",
                str(row["best_m"]),
                f"{row['gain_over_lock_step']:.2f}" if routed else "",
            )
        console.print(table)
        low = min(min(row["of_predicted"].values()) for row in rows)
        console.print(
            f"Measured is {low:.0%} of the prediction at least (target: 90 %).", markup=False
        )
        worse = [
            r
            for r in rows
            if r["tokens_per_s"][r["best_m"]] < 0.98 * r["tokens_per_s"][r["recursions"]]
        ]
        console.print(
            f"Best m worse than lock-step by more than 2 %: {len(worse)} of {len(rows)} rows.",
            markup=False,
        )
        memory = result["fixed_memory_bytes"]
        table = _table(
            f"KV memory, sequences of {result['tokens']} tokens, {memory / 2**20:.0f} MiB",
            "case",
            "depths",
            "KiB a sequence",
            "largest batch",
        )
        for row in rows:
            one = row["bytes_per_sequence"]
            table.add_row(row["case"], row["depths"], f"{one / 1024:.0f}", str(int(memory // one)))
        console.print(table)
    if rows := result.get("protocol"):
        table = _table(
            "The throughput protocol, everything in the timing",
            "model",
            "lanes",
            "KV MiB",
            "m",
            "tokens/s",
            "over vanilla",
        )
        for row in rows:
            for m, rate in row["tokens_per_s"].items():
                table.add_row(
                    row["model"],
                    str(row["lanes"]),
                    f"{row['kv_bytes'] / 2**20:.0f}",
                    str(m),
                    f"{rate:.0f}",
                    f"{row['over_vanilla'][m]:.2f}",
                )
        console.print(table)
        reached = max(max(r["over_vanilla"].values()) for r in rows)
        console.print(
            f"Reached {reached:.2f} times vanilla; published {PAPER_GAIN}, without KV writes.",
            markup=False,
        )


def main(_: list[str]) -> None:
    unknown = set(_PARTS.value) - {"depths", "protocol"}
    if unknown:
        raise UserError(f"--parts: {', '.join(sorted(unknown))} is none of depths, protocol.")
    size, dtype = SHAPES[_SHAPE.value], _DTYPE.value
    lanes = _LANES.value or size.lanes
    device = record.slug(jax.devices()[0].device_kind)
    default = (
        record.ROOT / "benchmarks" / "results" / f"decode_{device}_{_SHAPE.value}_{dtype}.json"
    )
    out = Path(_OUT.value) if _OUT.value else default
    record.claim(out)
    status, console = Console(stderr=True), Console()
    if console.width < 140 and not console.is_terminal:
        console = Console(width=160)

    def tell(text):
        return status.print(text, markup=False)

    load, begin = record._busy(), time.process_time()
    result: dict[str, Any] = {
        "benchmark": "decode",
        "time": record.now(),
        "commit": record.commit(),
        "device": mesh_device(make_mesh(MeshConfig())),
        "machine": platform.machine(),
        "processor": record.processor(),
        "cores": record.cores(),
        "versions": versions(),
        "shape_name": _SHAPE.value,
        "dtype": dtype,
        "lanes": lanes,
        "tokens": size.tokens,
    }
    if "depths" in _PARTS.value:
        result["depths"] = depths_part(size, lanes, dtype, tell)
        # What the vanilla engine of the first case needs for 32 sequences.
        result["fixed_memory_bytes"] = (
            32 * next(r for r in result["depths"] if r["depths"] == "vanilla")["bytes_per_sequence"]
        )
        if _CHECKPOINT.value:
            result["depths"] += trained_part(_CHECKPOINT.value, size, lanes, tell)
    if "protocol" in _PARTS.value:
        result["protocol"] = protocol_part(size, dtype, tell)
    after, own = record._busy(), time.process_time() - begin
    if load and after:
        result["others_share_of_cores"] = max(
            0.0, (after[0] - load[0] - own) / (after[1] - load[1])
        )
    show(result, console)
    record.write(out, result)
    console.print(f"Written: {out}", markup=False)


if __name__ == "__main__":
    cli.run(main)
