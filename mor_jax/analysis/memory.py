"""What a training step needs of each device's memory, by hand: an estimate to plan with, before anything compiles.

State: float32 weights, two float32 moments, float32 gradients (a second set while micro-batches are added up), cut over
fsdp and tensor; norms, routers and the survey are whole on every device.

Gathered, whole over fsdp: the tied core in the compute dtype and its gradient before it is scattered, from the first
recursion of the forward pass to the last of the backward; of blocks that are used once, one at a time (beside a tied
core its weights, else its gradient too); the embedding table, float32.

Activations, in values for each token and block application, c bytes each (c = size of `model.dtype`):

    remat           saved for the backward pass
    none            4 D + (N + 2K) H + 2 N H + 3 F + attention
    dots            4 D + (N + 2K) H + N H + 2 F + attention scores
    dots_no_batch   3 D + (N + 2K) H + 2 F
    block           D

4 D: both norms' inputs and outputs. 3 F: gate, up, and what they make. (Norm and SwiGLU have backward passes of
their own, which need no more.)
Attention: N heads times the keys a query is computed against (half a row and half a block of 128 in `blocked`, the
row in `xla`, none that are kept in `cudnn`) times the copies of each probability that stay: one float32 in `blocked`
(and one of c bytes if c < 4), three in `xla`. A recursion step runs the tokens it has room for: all of them in the
masked executor and under token-choice, whose largest compiled size holds whole rows.

`working` is the block that is being differentiated: its gradients, and what rematerialisation brings back of it.
`head`: a chunk's logits in float32, which become their own gradient in place (a second array, of c bytes, if c < 4),
and the gradients of the table and of the final states.

How good is it: within a factor of 1.5 of what XLA for CPUs reports for a compiled step without rematerialisation, and
of what JAX saves between forward and backward under each policy (both held by tests). XLA for CPUs merges the
recomputation with the original again, so on a CPU every policy costs what `none` costs; on GPUs and TPUs it does not.
What the allocator loses to fragmentation comes on top: leave a tenth of the memory free.

Letters: D width, N query heads, K kv heads, H head dim, F mlp width, V vocabulary, T row length, R recursions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mor_jax.analysis.accounting import DTYPE_BYTES, active_counts, parameters
from mor_jax.config import WITH_CAPACITIES, WITH_ROUTER, Config, DepthConfig, ModelConfig, mesh_shape
from mor_jax.model.depth.survey import PROBES_G
from mor_jax.model.program import build_program

FLOAT32 = 4
BLOCK = 128  # queries at once in `blocked` attention


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each device."""

    weights: float
    optimizer: float
    gradients: float
    gathered: float  # weights whole over fsdp, and their gradients
    saved: float  # between forward and backward
    working: float
    head: float
    remat: str

    @property
    def activations(self) -> float:
        """What comes and goes within a step, gradients excepted."""
        return self.gathered + self.saved + self.working + self.head

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the sums included."""
        return asdict(self) | {"activations": self.activations, "total": self.total}


def training_memory(cfg: Config, *, devices: int = 1, remat: str | None = None) -> TrainingMemory:
    """The estimate of the module's docstring.

    Args:
      devices: number the mesh spans. Weights, moments and gradients are cut over fsdp and tensor, rows over data and
        fsdp and, along time, over sequence; heads and mlp width over tensor.
      remat: another policy than the configuration's.
    Raises:
      ConfigError: `vocab_size` is still 0, or the mesh does not fit `devices`.
    """
    m, d, remat = cfg.model, cfg.depth, remat or cfg.model.remat
    data, fsdp, sequence, tensor = mesh_shape(cfg.mesh, devices)
    count, program, size = parameters(m, d), build_program(m), DTYPE_BYTES[m.dtype]
    # A routed model's survey is no parameter one counts, but lies among them, with moments of its own.
    survey = m.recursions * len(PROBES_G) if d.policy in WITH_ROUTER else 0
    whole = count.norms + count.router
    state = FLOAT32 * ((count.total - whole) / (fsdp * tensor) + whole + survey)
    rows = cfg.train.batch_size / cfg.train.accum / (data * fsdp) / sequence
    one_row = lambda tokens, policy: saved_bytes(m, tokens, policy, tensor)
    per_row = (program.prelude + program.coda) * one_row(m.context, remat)
    per_row += sum(program.core * program.repeat * one_row(k, remat) for k in row_sizes(m, d))
    block = size * count.blocks / program.unique_layers / tensor
    tied = program.recursions * program.repeat > 1
    # One device has the core in the compute dtype beside the weights; its gradient is then the state's own.
    gathered = program.core * block * (2 if fsdp > 1 else 1) if tied and (size < FLOAT32 or fsdp > 1) else 0.0
    if fsdp > 1:
        gathered += (program.prelude + program.coda > 0) * block if tied else 2 * block
        gathered += FLOAT32 * count.embedding / tensor  # its gradient is in `head`
    # Keys and values of whole rows, and their gradients, of the block at work.
    _, kv_heads, head_dim = m.dims
    over_time = 4 * size * rows * sequence * m.context * kv_heads * head_dim / tensor if sequence > 1 else 0.0
    gradient = size * rows * m.context * (2 * m.width + 3 * m.mlp_width / tensor)
    again = (
        over_time if remat == "none" else over_time + rows * (one_row(m.context, "none") - one_row(m.context, remat))
    )
    chunk = min(m.loss_chunk or m.context, m.context / sequence)
    chunk *= sequence  # rows are counted by their share of time
    vocabulary = m.vocab_size / tensor
    logits = FLOAT32 + (size if size < FLOAT32 else 0)
    return TrainingMemory(
        weights=state,
        optimizer=2 * state,
        gradients=state * (2 if cfg.train.accum > 1 else 1),
        gathered=gathered,
        saved=rows * per_row,
        working=gradient + again,
        head=vocabulary * (logits * rows * chunk + FLOAT32 * m.width) + size * rows * m.context * m.width,
        remat=remat,
    )


def row_sizes(model: ModelConfig, depth: DepthConfig) -> tuple[int, ...]:
    """Tokens of a row that each application of the core has room for, r = 1..R (one application when it repeats its
    blocks in place)."""
    if depth.policy in WITH_CAPACITIES and depth.executor == "gathered":
        return active_counts(model, depth)
    return (model.context,) * build_program(model).recursions


def saved_bytes(model: ModelConfig, tokens: int, remat: str, tensor: int = 1) -> float:
    """Bytes that one block application to `tokens` tokens of one row keeps for its backward pass."""
    heads, kv_heads, head_dim = model.dims
    width, hidden, size = model.width, model.mlp_width / tensor, DTYPE_BYTES[model.dtype]
    qkv, out = (heads + 2 * kv_heads) * head_dim / tensor, heads * head_dim / tensor
    values = {
        "none": 4 * width + qkv + 2 * out + 3 * hidden,
        "dots": 4 * width + qkv + out + 2 * hidden,
        "dots_no_batch": 3 * width + qkv + 2 * hidden,
        "block": width,
    }[remat]
    pairs = heads / tensor * _keys(model.attention, tokens)
    copies = {
        "none": {"blocked": FLOAT32 + (size if size < FLOAT32 else 0), "xla": 3 * FLOAT32, "cudnn": 0},
        "dots": {"blocked": FLOAT32, "xla": FLOAT32, "cudnn": 0},
    }.get(remat, {}).get(model.attention, 0)  # fmt: skip
    return tokens * (values * size + pairs * copies)


def _keys(attention: str, tokens: int) -> float:
    """Keys a query is computed against, on average."""
    return (tokens + min(BLOCK, tokens)) / 2 if attention == "blocked" else float(tokens)
