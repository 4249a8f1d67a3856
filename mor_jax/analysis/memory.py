"""What a training step needs of each device's memory, by hand: an estimate to plan with, before
anything compiles.

State: float32 weights, two float32 moments (under Muon one of the blocks' matrices), float32
gradients (a second set while micro-batches are added up), cut over fsdp and tensor; norms, routers
and the survey are whole on every device. Beside it a running mean of the weights (`optim.ema`) and
what is read and never changed: the weights that adapters belong to, a teacher, the reference of
preferences (where adapters are trained, the very weights they belong to). Adapters alone have
moments; the weights with the adapters in them, and their gradient, are made anew in each step.

Gathered, whole over fsdp: the tied core in the compute dtype, from the first recursion of the
forward pass to the last of the backward, and during that its gradient before it is scattered; of
blocks that are used once, one at a time (beside a tied core its weights, else its gradient too);
the embedding table, float32.

Activations, in values for each token and block application, c bytes each (c = size of
`model.dtype`):

    remat           saved for the backward pass
    none            4 D + (N + 2K) H + 2 N H + 3 F + attention
    dots            4 D + (N + 2K) H + N H + 2 F + attention scores
    dots_no_batch   3 D + (N + 2K) H + 2 F
    block           D

Under `model.qk_norm`, none keeps queries and keys before their norm as well, (N + K) H.

4 D: both norms' inputs and outputs. 3 F: gate, up, and what they make. (Norm and SwiGLU have
backward passes of their own, which need no more.)
Attention: N heads times the keys a query is computed against (half a row and half a block of 128 in
`blocked`, the row in `xla`, none that are kept by the kernels of `cudnn` and `splash`) times the
copies of each probability that stay: one float32 in `blocked` (and one of c bytes if c < 4), three
in `xla`. A recursion step runs the tokens it has room for: all of them in the masked executor and
under token-choice, whose largest compiled size holds whole rows.

Where rows are cut along time, or later recursions look back at the keys of the first, a query sees
more keys than that: those of the whole row up to its own end. Cut along time, gathered keys and
values are kept instead of a part of them.

`working` is the block that is being differentiated: its gradients, and what rematerialisation
brings back of it.
`head`: a chunk's logits in float32, which become their own gradient in place (a second array, of c
bytes, if c < 4), the gradient of the table, and the final states thrice (as they are, in chunks,
and those transposed) beside their gradient.

The fullest moment is one of four: the backward pass begins (everything saved, no gradients but
those of earlier micro-batches); the gradient of a tied core is there (what the head and the last
recursions needed is not); the backward pass ends (all gradients, nothing saved); the state is
updated (new weights and moments beside the old ones and the gradients, until the update's norm says
that they are good).

How good is it: within a factor of 1.5 of what JAX saves between forward and backward under each
policy, and within 10 % of what XLA for CPUs says of a compiled step in float32 (both held by tests;
`python -m benchmarks.plan_accuracy` lists programs). That compiler is told apart (`merged`), since
it merges rematerialisation and second gathers with the first: every policy costs what `none` costs,
gathered weights stay from the forward pass to the backward, and so does what the hand-written
backward passes would make anew, 2 D of the norms, F of SwiGLU (and N H of the queries, which it
cuts into blocks). Where a block lies in a checkpoint, scores are kept beside probabilities instead
of that F. In bfloat16 it keeps float32 copies at that (a quarter more, in one program that was
looked at).
What the allocator loses to fragmentation comes on top: leave a tenth of the memory free.

Letters: D width, N query heads, K kv heads, H head dim, F mlp width, V vocabulary, T row length, R
recursions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from mor_jax.analysis.accounting import DTYPE_BYTES, parameter_shapes, parameters
from mor_jax.config import Config, DepthConfig, MeshShape, ModelConfig, mesh_shape, saved_config
from mor_jax.config.fields import TARGETS
from mor_jax.model.adapter import Adapters
from mor_jax.model.depth import build_policy
from mor_jax.model.kv import SHARED, looks_back
from mor_jax.model.lm import LM
from mor_jax.model.program import build_program
from mor_jax.model.stack import in_loop
from mor_jax.parallel.rules import Rules

# Whether XLA for CPUs, as it comes with this jax, merges the gather of the backward pass with that
# of the forward pass. Up to jax 0.10 it drops the barrier between them before it looks for equal
# instructions.
MERGES_GATHERS = jax.__version_info__ < (0, 11)
FLOAT32 = 4
# Moments of a step.
BEGINS, CORE = "the backward pass begins", "the gradient of the core is there"
ENDS, UPDATE = "the backward pass ends", "the state is updated"
BLOCK = 128  # queries at once in `blocked` attention


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each device."""

    weights: float  # those that are trained
    optimizer: float
    frozen: float  # weights that are read and never changed
    average: float  # the running mean of the weights
    gradients: float  # during the backward pass
    own_gradients: float  # of what is trained, at the update
    gathered: float  # weights whole over fsdp
    saved: float  # between forward and backward
    working: float
    head: float
    update: float  # new weights and moments, while the old ones are kept beside them
    added: float  # gradients of micro-batches before this one
    core_gradient: float  # of a tied core, before it is scattered, after the recursions of `last`
    table: float  # of `gathered`, the table's: only the head and the embedding need it
    # of `gathered`, what was scattered before the recursions' backward pass or is gathered after it
    gone: float
    last: float  # of `saved`, the last recursion's or the last two's
    logits: float  # of `head`, all but the gradient of the table
    remat: str

    @property
    def held(self) -> dict[str, float]:
        """What lies in memory from step to step; what there is none of is left out."""
        found = {
            "parameters": self.weights,
            "optimiser": self.optimizer,
            "frozen weights": self.frozen,
            "mean of the weights": self.average,
        }
        return {name: size for name, size in found.items() if size}

    @property
    def activations(self) -> float:
        """What comes and goes within a step, gradients excepted."""
        return self.gathered + self.saved + self.working + self.head

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """What there is at the moments of a step that may be the fullest, beside what there always
        is (`held`)."""
        return {
            BEGINS: {
                "gradients": self.added,
                "gathered weights": self.gathered,
                "activations": self.saved + self.working,
                "head and logits": self.head,
            },
            CORE: {
                "gradients": self.added + self.core_gradient,
                "gathered weights": self.gathered - self.table - self.gone,
                "activations": self.saved - self.last + self.working,
                "head and logits": self.head - self.logits,
            },
            ENDS: {
                "gradients": self.gradients,
                "gathered weights": self.gathered,
                "activations": self.working,
            },
            UPDATE: {"gradients": self.own_gradients, "the update": self.update},
        }

    @property
    def moments(self) -> dict[str, float]:
        """The bytes of each."""
        return {moment: sum(parts.values()) for moment, parts in self.parts.items()}

    @property
    def fullest(self) -> str:
        """The fullest moment."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def total(self) -> float:
        return sum(self.held.values()) + self.moments[self.fullest]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the sums included."""
        return asdict(self) | {
            "activations": self.activations,
            "fullest": self.fullest,
            "total": self.total,
        }


def training_memory(
    cfg: Config,
    *,
    devices: int = 1,
    remat: str | None = None,
    merged: bool = False,
    state: float | None = None,
    backend: str = "cpu",
) -> TrainingMemory:
    """The estimate of the module's docstring.

    Args:
      devices: number the mesh spans. Weights, moments and gradients are cut over fsdp and tensor,
        rows over data and fsdp and, along time, over sequence; heads and mlp width over tensor.
      remat: another policy than the configuration's.
      merged: as XLA for CPUs compiles it.
      state: bytes of a device's share of the model's weights, if known (`parameter_bytes`).

      backend: that is compiled for, which decides where blocks are a loop (`model.scan_layers`).

    Attention "auto" is taken for "blocked"; `analysis.plan` knows the devices, and asks for what it
    would be there.

    Raises:
      ConfigError: `vocab_size` is still 0, the mesh does not fit `devices`, or the configuration of
        the teacher cannot be read.
    """
    if cfg.model.attention == "auto":
        cfg = replace(cfg, model=replace(cfg.model, attention="blocked"))
    m, d, remat = cfg.model, cfg.depth, "none" if merged else remat or cfg.model.remat
    mesh = mesh_shape(cfg.mesh, devices)
    data, fsdp, sequence, tensor = mesh
    count, program, size = parameters(m, d), build_program(m), DTYPE_BYTES[m.dtype]
    # A routed model's survey is no parameter one counts, but lies among them, with moments of its
    # own.
    survey = build_policy(m, d).counts(m.context).surveyed
    whole = count.norms + count.router
    if state is None:
        state = FLOAT32 * ((count.total - whole) / (fsdp * tensor) + whole + survey)
    lm, merged_weights = LM.from_config(cfg), 0.0
    trained, frozen = state, 0.0
    if cfg.adapter.rank:
        trained = shard_bytes(Adapters(lm, cfg.adapter), lm.rules, mesh)
        frozen = merged_weights = state
    elif cfg.data.format == "preference":
        frozen = state
    taught = 0  # width of a teacher's final states
    if cfg.distill.weight:
        source = saved_config(cfg.distill.teacher.rstrip("/").removesuffix("/checkpoints"))
        taught = source.model.width
        frozen += shard_bytes(LM(source.model, source.depth, lm.rules), lm.rules, mesh)
    optimizer = 2 * trained
    if cfg.optim.algorithm == "muon" and not cfg.adapter.rank:
        optimizer -= FLOAT32 * _muon_values(m, d) / (fsdp * tensor)
    average = trained if cfg.optim.ema else 0.0
    rows = cfg.train.batch_size / cfg.train.accum / (data * fsdp) / sequence
    tied = program.recursions * program.repeat > 1
    once = program.prelude + program.coda + (0 if tied else program.core)

    def kept(tokens: int, policy: str, row: int = 0, own_keys: bool = True) -> float:
        return saved_bytes(m, tokens, policy, tensor, sequence, row=row, own_keys=own_keys)

    ends = kept(m.context, remat)

    def more(tokens: int, cut: bool) -> float:
        return merged_bytes(m, tokens, tensor, sequence, cut) if merged else 0.0

    # Blocks whose weights are gathered lie in a checkpoint, which that compiler keeps apart since
    # jax 0.11.
    apart = fsdp > 1 and not MERGES_GATHERS
    per_row = once * (ends + (0.0 if apart else more(m.context, fsdp > 1)))
    back = looks_back(d.kv_name)
    runs = []  # of the core
    for r, k in enumerate(row_sizes(m, d) if tied else ()):
        seen = (m.context, d.kv_name != SHARED) if back and r else (0, True)
        runs.append(program.core * program.repeat * (kept(k, remat, *seen) + more(k, False)))
    per_row += sum(runs)
    block = size * count.blocks / program.unique_layers / tensor
    # One device has the core in the compute dtype beside the weights; its gradient is then the
    # state's own.
    core = program.core * block if tied else 0.0
    gathered = core if size < FLOAT32 or fsdp > 1 else 0.0
    table = FLOAT32 * count.embedding / tensor if fsdp > 1 else 0.0
    # Blocks of a loop: those used once are copied into a stack; of the core, two recursions'
    # gradients are whole arrays when they are added.
    alike = not m.recursion_encoding and program.networks == 1
    looped = {
        part: in_loop(m.scan_layers, blocks, backend, alike or part != "core")
        for part, blocks in (
            ("prelude", program.prelude),
            ("core", program.core),
            ("coda", program.coda),
        )
    }
    stack = block * (looped["prelude"] * program.prelude + looped["coda"] * program.coda)
    stack += 0 if tied else block * looped["core"] * program.core
    gathered += stack / fsdp if fsdp > 1 else 2 * stack  # and its gradient, before it is cast
    # Blocks used once lie around the recursions; where XLA for CPUs keeps them apart, it gathers a
    # block's weights no sooner than they are needed.
    gone = 0.0
    if fsdp > 1:
        around = once * block if merged and not apart else min(once, 1 if tied else 2) * block
        gathered += around
        gone = around if merged and apart and tied else 0.0
    # The core's gradient after the last recursion, or after one more, whose own is there before it
    # is added, block by block.
    unscattered = 1 if fsdp > 1 else FLOAT32 / size
    after = [
        (unscattered * core, rows * sum(runs[-1:])),
        (unscattered * (core + (core if looped["core"] else block)), rows * sum(runs[-2:])),
    ]
    core_gradient, last = max(after[: len(runs)], key=lambda a: a[0] - a[1], default=(0.0, 0.0))
    # Keys and values of whole rows, and their gradients, of the block at work.
    _, kv_heads, head_dim = m.dims
    over_time = (
        4 * size * rows * sequence * m.context * kv_heads * head_dim / tensor
        if sequence > 1
        else 0.0
    )
    gradient = size * rows * m.context * (2 * m.width + 3 * m.mlp_width / tensor)
    again = over_time if remat == "none" else over_time + rows * (kept(m.context, "none") - ends)
    chunk = min(m.loss_chunk or m.context, m.context / sequence)
    chunk *= sequence  # rows are counted by their share of time
    vocabulary = m.vocab_size / tensor
    logits = FLOAT32 + (size if size < FLOAT32 else 0)
    added = state if cfg.train.accum > 1 else 0.0
    scored = vocabulary * logits * rows * chunk + (FLOAT32 + 3 * size) * rows * m.context * m.width
    return TrainingMemory(
        weights=trained,
        optimizer=optimizer,
        frozen=frozen,
        average=average,
        gradients=state + added + (trained if cfg.adapter.rank else 0.0),
        own_gradients=trained,
        gathered=gathered + table + merged_weights,
        saved=rows * (per_row + size * m.context * taught),
        working=gradient + again,
        head=scored + FLOAT32 * vocabulary * m.width,
        update=trained + optimizer + average,
        added=added,
        core_gradient=core_gradient,
        table=table,
        gone=gone,
        last=last,
        logits=scored,
        remat=remat,
    )


def _muon_values(model: ModelConfig, depth: DepthConfig) -> int:
    """Values of the matrices that Muon updates: one moment of each, not two."""
    shapes = parameter_shapes(model, depth)
    parts = {part: shapes[part] for part in ("prelude", "core", "coda")}
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key in TARGETS)


def parameter_bytes(cfg: Config, mesh: MeshShape) -> int:
    """Bytes of a device's share of the model's weights, from their shapes and the rule table."""
    lm = LM.from_config(cfg)
    return shard_bytes(lm, lm.rules, mesh)


def shard_bytes(owner: LM | Adapters, rules: Rules, mesh: MeshShape) -> int:
    """Bytes of a device's share of what `owner.init` makes."""
    shapes, axes = _shapes(owner)
    abstract = AbstractMesh(tuple(mesh), mesh._fields, axis_types=(AxisType.Auto,) * len(mesh))

    def local(leaf: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> int:
        shard = NamedSharding(abstract, rules.spec(names)).shard_shape(leaf.shape)
        return math.prod(shard) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(local, shapes, axes)))


@functools.lru_cache(maxsize=16)
def _shapes(owner: LM | Adapters) -> tuple[Any, Any]:
    """Shapes and logical axes of the parameters; a search for a mesh asks for them a hundred
    times."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(owner.init, key), owner.logical_axes()


def row_sizes(model: ModelConfig, depth: DepthConfig) -> tuple[int, ...]:
    """Tokens of a row that each application of the core has room for, r = 1..R (one application
    when it repeats its blocks in place)."""
    if depth.executor == "gathered":
        return build_policy(model, depth).counts(model.context).row_sizes
    return (model.context,) * build_program(model).recursions


def saved_bytes(
    model: ModelConfig,
    tokens: int,
    remat: str,
    tensor: int = 1,
    sequence: int = 1,
    *,
    row: int = 0,
    own_keys: bool = True,
) -> float:
    """Bytes that one block application to `tokens` tokens of one row keeps for its backward pass;
    on one of `sequence` devices that share the row, times their number.

    Args:
      row: tokens of the row whose keys are seen, if they are more than those.
      own_keys: whether keys and values are made of these tokens.
    """
    heads, kv_heads, head_dim = model.dims
    width, hidden, size = model.width, model.mlp_width / tensor, DTYPE_BYTES[model.dtype]
    kv = 2 * kv_heads * head_dim / tensor if own_keys else 0.0
    out = heads * head_dim / tensor
    normed = out + kv / 2 if model.qk_norm else 0.0  # queries and keys before their norm
    values = {
        "none": 4 * width + kv * sequence + 3 * out + 3 * hidden + normed,
        "dots": 4 * width + kv + 2 * out + 2 * hidden,
        "dots_no_batch": 3 * width + kv + out + 2 * hidden,
        "block": width,
    }[remat]
    copies = {
        "none": {"blocked": FLOAT32 + (size if size < FLOAT32 else 0), "xla": 3 * FLOAT32},
        "dots": {"blocked": FLOAT32, "xla": FLOAT32},
    }.get(remat, {}).get(model.attention, 0)
    return tokens * (values * size + _pairs(model, tokens, tensor, sequence, row) * copies)


def merged_bytes(model: ModelConfig, tokens: int, tensor: int, sequence: int, cut: bool) -> float:
    """What XLA for CPUs keeps besides, of a block application. `cut`: its weights are cut over
    fsdp, so that it lies in a checkpoint."""
    heads, _, head_dim = model.dims
    values = 2 * model.width + heads * head_dim / tensor + (0 if cut else model.mlp_width / tensor)
    pairs = _pairs(model, tokens, tensor, sequence) if cut and model.attention == "blocked" else 0.0
    return tokens * (values * DTYPE_BYTES[model.dtype] + pairs * FLOAT32)


def _pairs(model: ModelConfig, tokens: int, tensor: int, sequence: int = 1, row: int = 0) -> float:
    """Scores a token has: heads here times the keys it is computed against, on average."""
    here = tokens / sequence
    keys = (
        max(row, tokens) - here + (here + min(BLOCK, here)) / 2
        if model.attention == "blocked"
        else max(row, tokens)
    )
    return model.dims[0] / tensor * keys
