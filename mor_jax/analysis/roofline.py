"""What bounds a program on a chip: its arithmetic or its memory.

Of a training step, the prefill of one prompt and a decode tick: FLOPs by hand
(`analysis/accounting.py`), bytes between a device and its memory (HBM), and for each chip the
seconds that either takes at the data sheet's rate. The larger bounds the program: no program is
faster. (`optimal_seconds` of XLA's cost analysis counts the body of a loop once, and is negative
for some of our programs; nothing here uses it.)

Bytes are read off the compiled program where there is one (`analysis/hbm.py`). Else they are
planned: each array is read once by each operation that needs it and written once, and a kernel
keeps the scores of attention on the chip ("blocked" and "xla" write them). For every micro-batch, c
bytes a value:

* weights: a block application reads its matrices forward and backward (once more where it is
  rematerialised), and writes their gradient, which a tied core also reads to add it up. Where they
  are cut over fsdp, gathered weights are written too, and gradients read to be scattered.
* activations: what `none` keeps for the backward pass (`memory.saved_bytes`) is written and read,
  forward, backward twice (of products, each gradient is read for its input and its weight), and
  once more where it is rematerialised; what is kept is written and read besides.
* head: the table for each chunk of logits, forward and twice backward, and the logits themselves,
  float32, written and read forward and backward.
* once a step: the optimiser reads gradients, weights and moments, and writes weights and moments;
  micro-batches add up gradients.

Prefill: weights once an application, activations as forward of the tokens that run, keys and
values written. A decode tick is one pass
over the core of all lanes and, for one lane in as many as a token runs recursions on average, the
blocks around it and the head: weights of all once, keys and values of each lane (`decode_traffic`
over the passes of a token).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from mor_jax.analysis import units
from mor_jax.analysis.accounting import (
    DTYPE_BYTES,
    block_weights_read,
    head_weights,
    kv_bytes_per_token,
    parameters,
    true_flops_per_token,
    true_step_flops,
)
from mor_jax.analysis.memory import FLOAT32, row_sizes, saved_bytes, training_memory
from mor_jax.analysis.peaks import peak_flops
from mor_jax.analysis.topologies import CHIPS, Chip
from mor_jax.analysis.traffic import decode_traffic
from mor_jax.config import Config, ModelConfig, mesh_shape
from mor_jax.model.program import build_program

SHOWN = ("v5e", "v5p", "v6e", "h100", "h200")
LANES = 64  # of the decode tick


@dataclass(frozen=True)
class Cost:
    """What one run of a program costs a device. `source`: of `bytes`, "plan" or "compiled"."""

    program: str
    flops: float
    bytes: float
    source: str = "plan"

    @property
    def intensity(self) -> float:
        """FLOPs for each byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Bound:
    """A program on a chip: seconds that arithmetic and memory take at least."""

    chip: str
    compute_s: float
    memory_s: float

    @property
    def by(self) -> str:
        """ "compute" or "memory"."""
        return "compute" if self.compute_s >= self.memory_s else "memory"

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s)

    @property
    def mfu(self) -> float:
        """Share of the chip's peak that the program reaches at most."""
        return self.compute_s / self.seconds


def bound(cost: Cost, name: str, dtype: str) -> Bound:
    """Of a chip of `topologies.CHIPS` whose peak is known."""
    chip = CHIPS[name]
    return Bound(name, cost.flops / _peak(chip, dtype), cost.bytes / chip.hbm)


def costs(
    cfg: Config, *, devices: int = 1, lanes: int = LANES, compiled_bytes: float | None = None
) -> tuple[Cost, ...]:
    """The training step, each device its share; the prefill of one row of `model.context` tokens,
    and a decode tick of `lanes` lanes that are half full, on one device each.

    Args:
      compiled_bytes: of the training step and a device, where it was compiled (`hbm.traffic`).
    Raises ConfigError: `vocab_size` is still 0, or the mesh does not fit `devices`.
    """
    step = true_step_flops(cfg) / devices
    planned = compiled_bytes is None
    moved = training_bytes(cfg, devices=devices) if compiled_bytes is None else compiled_bytes
    return (
        Cost("training step", step, moved, "plan" if planned else "compiled"),
        Cost(f"prefill of {cfg.model.context:,} tokens", *_prefill(cfg)),
        Cost(f"decode tick of {lanes} lanes", *_tick(cfg, lanes)),
    )


def training_bytes(cfg: Config, *, devices: int = 1) -> float:
    """Bytes that an optimiser step moves between a device and its memory, as planned above."""
    m, d, mesh = cfg.model, cfg.depth, mesh_shape(cfg.mesh, devices)
    program, c, count = build_program(m), DTYPE_BYTES[m.dtype], parameters(m, d)
    rows = cfg.train.batch_size / cfg.train.accum / (mesh.data * mesh.fsdp)
    again = m.remat != "none"
    cut = mesh.fsdp > 1

    block = c * count.blocks / program.unique_layers / mesh.tensor
    applications = program.unrolled_layers
    unique = program.unique_layers
    tied = program.recursions * program.repeat > 1
    weights = applications * (2 + again) * block  # read by products
    weights += (applications + (applications - unique)) * block  # gradients, added up
    gathers = program.core + 2 * (unique - program.core) if tied else 2 * unique
    weights += (gathers + unique) * block if cut else 0.0

    runs = [m.context] * (program.prelude + program.coda)
    runs += [k for k in row_sizes(m, d) for _ in range(program.core * program.repeat)]
    activations = 0.0
    for tokens in runs:
        of_all = saved_bytes(m, tokens, "none", mesh.tensor, mesh.sequence)
        kept = saved_bytes(m, tokens, m.remat, mesh.tensor, mesh.sequence)
        activations += 2 * (3 + again) * of_all + 2 * kept * again
    activations *= rows / mesh.sequence

    head = _head_bytes(m, rows / mesh.sequence, mesh.tensor)
    state = training_memory(cfg, devices=devices)
    optimiser = 3 * state.own_gradients + 2 * (state.weights + state.optimizer) + state.average
    added = 3 * state.added if cfg.train.accum > 1 else 0.0
    return cfg.train.accum * (weights + activations + head + added) + optimiser


def _head_bytes(m: ModelConfig, rows: float, tensor: int) -> float:
    chunks = m.context / min(m.loss_chunk or m.context, m.context)
    table = FLOAT32 * head_weights(m) / tensor
    logits = rows * m.context * m.vocab_size / tensor * FLOAT32
    states = rows * m.context * m.width * DTYPE_BYTES[m.dtype]
    return 4 * chunks * table + 4 * logits + 4 * states


def _prefill(cfg: Config) -> tuple[float, float]:
    m, d, program = cfg.model, cfg.depth, build_program(cfg.model)
    c, t = DTYPE_BYTES[m.dtype], m.context
    flops = true_flops_per_token(m, d, recursion=cfg.recursion)
    kernel = dataclasses.replace(m, attention="splash")
    whole = program.prelude + program.coda + (program.core if m.recursions == 1 else 0)
    layers = whole + program.core * (sum(d.shares(m)) if m.recursions > 1 else 0)
    moved = c * (block_weights_read(m) + head_weights(m)) + t * kv_bytes_per_token(m, d)
    moved += 2 * layers * saved_bytes(kernel, t, "none")
    return t * (flops.total - flops.head) + flops.head, moved


def _tick(cfg: Config, lanes: int) -> tuple[float, float]:
    m, d, program = cfg.model, cfg.depth, build_program(cfg.model)
    c = DTYPE_BYTES[m.dtype]
    passes = sum(d.shares(m)) if program.recursions > 1 else 1.0  # over the core, of a mean token
    flops = true_flops_per_token(m, d, recursion=cfg.recursion).total
    traffic = decode_traffic(m, d, m.context // 2, recursion=cfg.recursion)
    block = parameters(m, d).blocks / program.unique_layers
    weights = c * (block * program.unique_layers * program.repeat + head_weights(m))
    return lanes * flops / passes, weights + lanes * (traffic.read_mean + traffic.written) / passes


def _peak(chip: Chip, dtype: str) -> float:
    peak = peak_flops(chip.kind, dtype)
    assert peak is not None, f"the peak of {chip.kind} is unknown"
    return peak


def report(found: tuple[Cost, ...], dtype: str) -> list[dict[str, Any]]:
    """JSON-ready: each program with its bound on the chips of `SHOWN`."""
    return [
        dataclasses.asdict(cost)
        | {
            "intensity": cost.intensity,
            "chips": {
                b.chip: {"bound": b.by, "seconds": b.seconds, "mfu at most": b.mfu}
                for b in (bound(cost, name, dtype) for name in SHOWN)
            },
        }
        for cost in found
    ]


def roofline_table(found: tuple[Cost, ...], dtype: str) -> Table:
    """What a person wants to see of it: a program a column, a chip a line."""
    table = Table("a device, at least", *(cost.program for cost in found), box=box.SIMPLE)
    table.add_row("FLOPs", *(units.si(cost.flops) for cost in found))
    moved = (f"{units.size(cost.bytes)} ({cost.source})" for cost in found)
    table.add_row("to and from memory", *moved)
    table.add_row("FLOPs a byte", *(units.significant(cost.intensity) for cost in found))
    table.add_section()
    for name in SHOWN:
        bounds = [bound(cost, name, dtype) for cost in found]
        table.add_row(name, *(f"{b.by}, {units.si(1e3 * b.seconds, 'ms')}" for b in bounds))
    return table
