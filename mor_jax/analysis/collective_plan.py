"""The collectives that the maths of a training step asks for, before anything is compiled: what,
over which axes, bytes.

Per optimiser step and device, bytes as in `analysis/collectives.py`. n_a is the size of mesh axis
a; c the bytes of a value in `model.dtype`. For every micro-batch:

* over fsdp, each matrix of a block, cut over tensor: gathered (c bytes a value) and its gradient
  scattered (float32, as all sums of gradients are). The tied core once, however often it is used; a
  block that is used once twice, since it is not kept for the backward pass. The table likewise,
  float32; twice under a policy with several row sizes, whose prelude is differentiated apart.
* over data (and sequence): the gradients that are left on each device, reduced.
* over sequence: keys and values of each block application gathered, their gradients scattered (once
  more gathered under rematerialisation); where a step narrows the row, the tokens' states and, to
  put them back, their results.
* over tensor: the result of the attention and of the mlp of each block application, and their
  gradients (the states' size each); rows looked up in the table; the head's softmax over its share
  of the vocabulary, and the gradient of the states.

Norms, routers and the survey of scores are small and lumped together as "small"; metrics are left
out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import jax

from mor_jax import nn
from mor_jax.analysis.accounting import DTYPE_BYTES, parameters
from mor_jax.analysis.memory import FLOAT32, row_sizes
from mor_jax.config import Config, MeshShape, mesh_shape
from mor_jax.model.depth import build_policy
from mor_jax.model.kv import looks_back
from mor_jax.model.program import build_program


@dataclass(frozen=True)
class Planned:
    """One line of the plan. `bytes`: sent by each device per optimiser step. `dcn`: crosses
    slices."""

    what: str
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    dcn: bool = False


def planned_collectives(cfg: Config, *, devices: int, regather: bool = True) -> list[Planned]:
    """The plan of the module's docstring.

    Args:
      regather: whether weights that are used once are gathered again for the backward pass, as the
        step is written and as accelerators run it. See `MERGES_GATHERS`.
    Raises:
      ConfigError: the mesh does not fit `devices`, or `vocab_size` is still 0.
    """
    m, d, mesh = cfg.model, cfg.depth, mesh_shape(cfg.mesh, devices)
    count, program, c = parameters(m, d), build_program(m), DTYPE_BYTES[m.dtype]
    block = count.blocks / program.unique_layers / mesh.tensor  # values
    table = count.embedding / mesh.tensor
    tied = program.recursions * program.repeat > 1
    once = program.prelude + program.coda + (0 if tied else program.core)
    kept = program.core if tied else 0
    policy = build_policy(m, d)
    tables = 2 if len(policy.profiles(m.context)) > 1 and d.executor == "gathered" else 1
    found: list[Planned] = []

    def add(
        what: str, kind: str, axes: tuple[str, ...], number: int, values: float, size: int
    ) -> None:
        n = 1
        for axis in axes:
            n *= getattr(mesh, axis)
        axes = tuple(a for a in axes if getattr(mesh, a) > 1)
        if n > 1 and number:
            share = {"all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
            dcn = "data" in axes and cfg.mesh.slices > 1
            found.append(Planned(what, kind, axes, number, number * values * size * share, dcn))

    axes_of_block = jax.tree.leaves(
        nn.logical_axes(nn.Block(m)), is_leaf=lambda names: isinstance(names, tuple)
    )
    matrices = sum("embed" in names for names in axes_of_block)  # qkv, out, gate and up, down
    uses = 2 if regather else 1
    add("core", "all-gather", ("fsdp",), matrices * kept, block / matrices, c)
    add("blocks used once", "all-gather", ("fsdp",), matrices * once * uses, block / matrices, c)
    add("embedding", "all-gather", ("fsdp",), tables, table, FLOAT32)
    add("core gradient", "reduce-scatter", ("fsdp",), matrices * kept, block / matrices, FLOAT32)
    add("block gradients", "reduce-scatter", ("fsdp",), matrices * once, block / matrices, FLOAT32)
    add("embedding gradient", "reduce-scatter", ("fsdp",), tables, table, FLOAT32)
    add(
        "gradients",
        "all-reduce",
        ("data", "sequence"),
        1,
        (kept + once) * block / mesh.fsdp,
        FLOAT32,
    )
    add("embedding gradient", "all-reduce", ("data", "sequence"), 1, table / mesh.fsdp, FLOAT32)
    small = count.norms + count.router + policy.counts(m.context).surveyed
    add("small", "all-reduce", ("data", "fsdp", "sequence"), 1, small, FLOAT32)

    rows = cfg.train.batch_size / cfg.train.accum / (mesh.data * mesh.fsdp)
    _over_sequence(add, cfg, mesh, rows)
    # Block applications by the tokens that run them.
    runs = [m.context] * (program.prelude + program.coda) + [
        k for k in row_sizes(m, d) for _ in range(program.core)
    ]
    runs = runs if program.repeat == 1 else runs + [m.context] * program.core * (program.repeat - 1)
    tokens = rows * sum(runs) / mesh.sequence
    states = 4 + (2 if m.remat != "none" else 0)
    add(
        "attention and mlp results",
        "all-reduce",
        ("tensor",),
        states * len(runs),
        tokens * m.width / len(runs),
        c,
    )
    head = rows * m.context / mesh.sequence
    # The table is cut by rows: a lookup is a sum in which one device's share is not zero. Tokens,
    # then targets.
    add("rows of the table", "all-reduce", ("tensor",), 2, head * m.width, FLOAT32)
    add("states under the head", "all-reduce", ("tensor",), 1, head * (m.width + 3), FLOAT32)
    return found if cfg.train.accum == 1 else [_repeated(p, cfg.train.accum) for p in found]


class Add(Protocol):
    """Adds what is planned, where the axes have more than one device."""

    def __call__(
        self, what: str, kind: str, axes: tuple[str, ...], number: int, values: float, size: int
    ) -> None: ...


def _over_sequence(add: Add, cfg: Config, mesh: MeshShape, rows: float) -> None:
    if mesh.sequence == 1:
        return
    m, d, program, c = cfg.model, cfg.depth, build_program(cfg.model), DTYPE_BYTES[cfg.model.dtype]
    _, kv_heads, head_dim = m.dims
    kv = 2 * rows * kv_heads * head_dim / mesh.tensor  # values a token
    again = 2 if m.remat != "none" else 1
    # Each device runs an equal part of a step, so its tokens are rounded up.
    picked = [-(-k // mesh.sequence) * mesh.sequence for k in row_sizes(m, d)]
    sizes = [m.context] * len(picked) if looks_back(d.kv_name) else picked
    ends = (program.prelude + program.coda, m.context)
    for count, tokens in (ends, *((program.core * program.repeat, k) for k in sizes)):
        add("keys and values", "all-gather", ("sequence",), 2 * count * again, kv / 2 * tokens, c)
        add("their gradients", "reduce-scatter", ("sequence",), 2 * count, kv / 2 * tokens, FLOAT32)
    before = m.context
    for k in picked:
        # taken from `before` tokens, put back among them; the gradients travel the other way
        if k < before:
            add(
                "states of picked tokens",
                "all-gather",
                ("sequence",),
                4,
                rows * m.width * (before + k) / 2,
                c,
            )
            before = k


def _repeated(p: Planned, times: int) -> Planned:
    return Planned(p.what, p.kind, p.axes, p.count * times, p.bytes * times, p.dcn)


def total_bytes(plan: Iterable[Planned], *kinds: str) -> float:
    """Bytes of these kinds (default: of all)."""
    return sum(p.bytes for p in plan if not kinds or p.kind in kinds)
