"""What decoding keeps and what it reads: keys and values by depth, bytes moved a token.

Under recursion-wise caching a token has keys at recursion r only if it ran r, and a token that runs
r attends to those alone (paper 2.2.2). With share_r of the tokens running r, after n tokens a depth
holds share_r · n entries a layer. A token that goes all the way reads every one of them: Σ share_r
of what a Recursive Transformer reads, the paper's (R + 1) / 2R at the default capacities. The mean
token reads less still, Σ share_r², because it runs r only with probability share_r (as if depths
were independent of the position). Shared keys are stored once and read at each recursion a token
runs; under the hybrid every token has an entry at every depth.

Counted is what has to move. A decoder whose buffers are padded to the longest sequence reads the
padding too.

Letters: D width, K kv heads, H head dim, R recursions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mor_jax.analysis.accounting import (
    DTYPE_BYTES,
    block_weights_read,
    head_weights,
    injection_matrices,
    kv_bytes_per_token,
    kv_values,
)
from mor_jax.config import DepthConfig, ModelConfig, RecursionConfig
from mor_jax.errors import ConfigError
from mor_jax.model.kv import renews
from mor_jax.model.program import build_program
from mor_jax.model.recursion.exit import reads as exit_reads


@dataclass(frozen=True)
class KvDepth:
    """Keys and values that one part of the program keeps."""

    part: str  # prelude | recursion 1 | ... | coda
    layers: int  # block applications that keep keys of their own here
    stored: float  # share of tokens that have an entry
    read_full: float  # of the entries of all tokens, how often a token of full depth reads them
    read_mean: float  # and the mean token
    bytes_per_entry: int  # one token in all of these layers

    @property
    def bytes_per_token(self) -> float:
        """Bytes a token of context costs here, averaged over tokens."""
        return self.stored * self.bytes_per_entry

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the product."""
        return asdict(self) | {"bytes_per_token": self.bytes_per_token}


@dataclass(frozen=True)
class DecodeTraffic:
    """Bytes that decoding one token has to move at a given context."""

    context: int  # tokens already in the cache
    read_full_depth: float  # cached keys and values a token of depth R reads
    read_mean: float  # and the mean token
    written: float  # keys and values the mean token adds
    weights: float  # read once a step for the whole batch; a shared block once for each application

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def kv_by_depth(
    model: ModelConfig,
    depth: DepthConfig,
    *,
    mean_active: Sequence[float] | None = None,
    bytes_per_value: int | None = None,
) -> tuple[KvDepth, ...]:
    """What each part of the program keeps; `sum(d.bytes_per_token)` is
    `accounting.kv_bytes_per_token`.

    Args:
      mean_active: share of tokens that ran recursion r = 1..R, e.g. measured in causal evaluation;
        default the capacities.
      bytes_per_value: default that of `model.dtype`.
    Raises:
      ConfigError: `mean_active` is not one number a recursion.
    """
    if mean_active is not None and len(mean_active) != model.recursions:
        raise ConfigError(
            f"mean_active has {len(mean_active)} entries for recursions = {model.recursions}."
        )
    shares = tuple(mean_active) if mean_active is not None else depth.shares(model)
    program = build_program(model)
    layer = kv_values(model) * (
        DTYPE_BYTES[model.dtype] if bytes_per_value is None else bytes_per_value
    )

    def part(name: str, blocks: int, stored: float, full: float, mean: float) -> KvDepth:
        return KvDepth(name, blocks, stored, full, mean, blocks * layer)

    strategy, steps = depth.kv_name, program.recursions
    if program.repeat > 1:  # a block's repetitions are as many caches of one pass over the core
        core = [part("core, in place", program.core * program.repeat, 1.0, 1.0, 1.0)]
    elif strategy == "shared":
        core = [part("core, made at r = 1", program.core, 1.0, float(steps), sum(shares))]
    elif renews(strategy):
        core = [part(f"recursion {r}", program.core, 1.0, 1.0, s) for r, s in enumerate(shares, 1)]
    else:
        core = [part(f"recursion {r}", program.core, s, s, s * s) for r, s in enumerate(shares, 1)]
    ends = [
        part(name, blocks, 1.0, 1.0, 1.0)
        for name, blocks in (("prelude", program.prelude), ("coda", program.coda))
    ]
    return tuple(d for d in (ends[0], *core, ends[1]) if d.layers)


def decode_traffic(
    model: ModelConfig,
    depth: DepthConfig,
    context: int | None = None,
    *,
    mean_active: Sequence[float] | None = None,
    bytes_per_value: int | None = None,
    recursion: RecursionConfig | None = None,
) -> DecodeTraffic:
    """Bytes moved for one decoded token when `context` tokens (default: the model's) are in the
    cache.

    Raises:
      ConfigError: `vocab_size` is still 0 (the head's weights), or `mean_active` is not one number
        a recursion.
    """
    n = model.context if context is None else context
    parts = kv_by_depth(model, depth, mean_active=mean_active, bytes_per_value=bytes_per_value)
    c, steps = recursion or RecursionConfig(), model.recursions
    heads = 1 + steps * (exit_reads(c.exit) == "head")  # an exit rule may read it after each step
    injections = steps * injection_matrices(model, depth, c)
    return DecodeTraffic(
        context=n,
        read_full_depth=n * sum(d.read_full * d.bytes_per_entry for d in parts),
        read_mean=n * sum(d.read_mean * d.bytes_per_entry for d in parts),
        written=kv_bytes_per_token(
            model, depth, mean_active=mean_active, bytes_per_value=bytes_per_value
        ),
        weights=DTYPE_BYTES[model.dtype]
        * (block_weights_read(model) + heads * head_weights(model) + injections),
    )
