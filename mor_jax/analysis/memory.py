"""What a training step needs of each device's memory, by hand: an estimate to plan with, before
anything compiles.

State: float32 weights, two float32 moments, float32 gradients (a second set while micro-batches are
added up), cut over fsdp and tensor; norms, routers and the survey are whole on every device.

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

from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from mor_jax.analysis.accounting import DTYPE_BYTES, parameters
from mor_jax.config import Config, DepthConfig, ModelConfig, mesh_shape
from mor_jax.model.depth import build_policy
from mor_jax.model.kv import SHARED, looks_back
from mor_jax.model.program import build_program

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

    weights: float
    optimizer: float
    gradients: float
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
    def activations(self) -> float:
        """What comes and goes within a step, gradients excepted."""
        return self.gathered + self.saved + self.working + self.head

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """What there is at the moments of a step that may be the fullest, weights and optimiser
        excepted."""
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
            UPDATE: {"gradients": self.gradients, "the update": self.update},
        }

    @property
    def moments(self) -> dict[str, float]:
        """The bytes of each."""
        return {moment: sum(parts.values()) for moment, parts in self.parts.items()}

    @property
    def fullest(self) -> str:
        """The fullest moment."""
        return max(self.moments, key=self.moments.get)

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.moments[self.fullest]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the sums included."""
        return asdict(self) | {
            "activations": self.activations,
            "fullest": self.fullest,
            "total": self.total,
        }


def training_memory(
    cfg: Config, *, devices: int = 1, remat: str | None = None, merged: bool = False
) -> TrainingMemory:
    """The estimate of the module's docstring.

    Args:
      devices: number the mesh spans. Weights, moments and gradients are cut over fsdp and tensor,
        rows over data and fsdp and, along time, over sequence; heads and mlp width over tensor.
      remat: another policy than the configuration's.
      merged: as XLA for CPUs compiles it.

    Attention "auto" is taken for "blocked"; `analysis.plan` knows the devices, and asks for what it
    would be there.

    Raises:
      ConfigError: `vocab_size` is still 0, or the mesh does not fit `devices`.
    """
    if cfg.model.attention == "auto":
        cfg = replace(cfg, model=replace(cfg.model, attention="blocked"))
    m, d, remat = cfg.model, cfg.depth, "none" if merged else remat or cfg.model.remat
    data, fsdp, sequence, tensor = mesh_shape(cfg.mesh, devices)
    count, program, size = parameters(m, d), build_program(m), DTYPE_BYTES[m.dtype]
    # A routed model's survey is no parameter one counts, but lies among them, with moments of its
    # own.
    survey = build_policy(m, d).counts(m.context).surveyed
    whole = count.norms + count.router
    state = FLOAT32 * ((count.total - whole) / (fsdp * tensor) + whole + survey)
    rows = cfg.train.batch_size / cfg.train.accum / (data * fsdp) / sequence
    tied = program.recursions * program.repeat > 1
    once = program.prelude + program.coda + (0 if tied else program.core)

    def kept(tokens, policy, **of_keys):
        return saved_bytes(m, tokens, policy, tensor, sequence, **of_keys)

    ends = kept(m.context, remat)

    def more(tokens, cut):
        return merged_bytes(m, tokens, tensor, sequence, cut) if merged else 0.0

    # Blocks whose weights are gathered lie in a checkpoint, which that compiler keeps apart since
    # jax 0.11.
    apart = fsdp > 1 and not MERGES_GATHERS
    per_row = once * (ends + (0.0 if apart else more(m.context, fsdp > 1)))
    back = looks_back(d.kv_name)
    runs = []  # of the core
    for r, k in enumerate(row_sizes(m, d) if tied else ()):
        seen = {"row": m.context, "own_keys": d.kv_name != SHARED} if back and r else {}
        runs.append(program.core * program.repeat * (kept(k, remat, **seen) + more(k, False)))
    per_row += sum(runs)
    block = size * count.blocks / program.unique_layers / tensor
    # One device has the core in the compute dtype beside the weights; its gradient is then the
    # state's own.
    core = program.core * block if tied else 0.0
    gathered = core if size < FLOAT32 or fsdp > 1 else 0.0
    table = FLOAT32 * count.embedding / tensor if fsdp > 1 else 0.0
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
        (unscattered * (core + block), rows * sum(runs[-2:])),
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
        weights=state,
        optimizer=2 * state,
        gradients=state + added,
        gathered=gathered + table,
        saved=rows * per_row,
        working=gradient + again,
        head=scored + FLOAT32 * vocabulary * m.width,
        update=3 * state - added,  # micro-batches are added up by then
        added=added,
        core_gradient=core_gradient,
        table=table,
        gone=gone,
        last=last,
        logits=scored,
        remat=remat,
    )


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
