"""What a model costs, counted by hand: parameters, FLOPs, cache bytes.

Nothing is computed on a device or compiled. Weights are counted in the parameter tree itself, by
`jax.eval_shape` of `LM.init`; FLOPs and cache entries are arithmetic on the configuration. Compiler
cost analysis is no substitute: it counts the body of a `scan` once, whatever its length, and would
report a recursive model as R times cheaper than it is.

Two FLOPs conventions live side by side and must never be mixed:

* **paper** - the accounting of the Mixture-of-Recursions paper (arXiv 2507.10524, appendix D;
  constants recovered in the MoR spec, section 6.4): forward only, no LM head, no router, keys and
  values at full width as if every query head had its own, causal half of the attention. A budget in
  `config.train.flops` is in these FLOPs, because every published number is.
* **true** - what the arithmetic of the network is: keys and values at grouped-query width,
  attention over the tokens that take part, the head and the router included; training is three
  forwards (one forward, two for the gradients), rematerialisation not counted. Use it for MFU and
  for honest comparisons.

Letters: D width, N query heads, K kv heads, H head dim, F mlp width, V vocabulary, T row length, R
recursions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mor_jax import nn

# re-exported: accounting is where one looks for it
from mor_jax.analysis.peaks import peak_flops as peak_flops
from mor_jax.config import Config, DepthConfig, ModelConfig, RecursionConfig
from mor_jax.errors import ConfigError
from mor_jax.model import program
from mor_jax.model.depth import build_policy
from mor_jax.model.depth.survey import SURVEY
from mor_jax.model.depth.vary import mixture
from mor_jax.model.depth.warmup import is_warm, shares_in, stage_of, stages
from mor_jax.model.kv import SHARED, looks_back
from mor_jax.model.lm import LM
from mor_jax.model.program import build_program
from mor_jax.model.recursion.exit import reads as exit_reads
from mor_jax.model.recursion.sampling import probabilities

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ParameterCount:
    """Unique parameters (a shared block counts once)."""

    embedding: int  # V * D of the embedding, and as many of the head unless it is the same array
    blocks: int  # matrices of the unique blocks, and the low-rank additions of each recursion
    # two a block (and recursion, if they are its own), and the final one; recursion encodings;
    # biases
    norms: int
    router: int  # expert-choice: a router a recursion; token-choice: one with R outputs

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding

    @property
    def non_embedding(self) -> int:
        return self.blocks + self.norms + self.router

    def to_dict(self) -> dict[str, int]:
        """JSON-ready, the sums included."""
        return {
            "embedding": self.embedding,
            "blocks": self.blocks,
            "norms": self.norms,
            "router": self.router,
            "total": self.total,
            "non_embedding": self.non_embedding,
        }


@dataclass(frozen=True)
class TrueFlops:
    """Forward FLOPs a token, averaged over a full row."""

    blocks: float  # matrix products of the blocks
    attention: float  # scores and weighted values, causal half
    head: float  # 2 * D * V
    router: float  # 2 * its parameters per candidate
    # forward and backward of a training step: three forwards, unless `config.recursion` draws the
    # number of steps, truncates the gradient or reads the head after each step
    training: float
    recursion: float = 0.0  # matrix products beside the core: the injection at each step
    # what an exit rule reads at inference, the head or the gate after each step; not in the total
    exit: float = 0.0

    @property
    def total(self) -> float:
        """Of a forward pass at the configured recursions, without an exit rule."""
        return self.blocks + self.attention + self.head + self.router + self.recursion


def parameters(
    model: ModelConfig, depth: DepthConfig, recursion: RecursionConfig | None = None
) -> ParameterCount:
    """Count the unique parameters; those of `recursion` beside the core are among the blocks' and
    the norms'.

    Raises:
      ConfigError: `vocab_size` is still 0, i.e. not yet taken from the tokenizer.
    """
    _vocabulary(model)
    tree = parameter_shapes(model, depth, recursion)
    # the survey is no weight
    router = {name: leaf for name, leaf in tree["router"].items() if name != SURVEY}
    parts = [tree.get(part, {}) for part in ("prelude", "core", "coda", "recursion")]
    return ParameterCount(
        embedding=_size([tree["embed"], tree.get("head", {})]),
        blocks=_size(parts, _is_matrix),
        norms=_size([parts, tree["norm"]], lambda name: not _is_matrix(name)),
        router=_size(router),
    )


@functools.lru_cache(maxsize=512)
def parameter_shapes(
    model: ModelConfig, depth: DepthConfig, recursion: RecursionConfig | None = None
) -> dict[str, Any]:
    """Shapes of the parameters as `LM.init` makes them."""
    return jax.eval_shape(
        lambda: LM(model, depth, recursion=recursion or RecursionConfig()).init(jax.random.key(0))
    )


@functools.lru_cache(maxsize=512)
def _leaf_shapes(module: type, model: ModelConfig) -> dict[str, Any]:
    """Shapes of what `nn.Block` or `nn.Lora` declares."""
    return jax.eval_shape(lambda: nn.init(module(model), jax.random.key(0)))


def _is_matrix(name: str) -> bool:
    return name not in nn.VECTORS


def _size(tree: Any, counts: Callable[[str], bool] = lambda name: True) -> int:
    """Numbers in the leaves whose name counts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if counts(path[-1].key))


def active_counts(model: ModelConfig, depth: DepthConfig) -> tuple[int, ...]:
    """Tokens that run recursion r = 1..R in a full row."""
    return program.active_counts(depth.shares(model), model.context)


def paper_flops_per_token(
    model: ModelConfig,
    depth: DepthConfig,
    context: int | None = None,
    *,
    shares: Sequence[float] | None = None,
) -> float:
    """Forward FLOPs a token in the paper's accounting (module docstring).

    A full layer costs a + b with a = 2(4 D² + 3 D F) for the matrices and b = 2 D (n + 1) for
    causal attention over n tokens; at capacity c it costs c a + c² b, since both queries and keys
    shrink. Under shared keys a step r > 1 costs c (a - 4 D²) + c b: no key or value is projected,
    and the queries that are left look at all tokens; under the hybrid, which the paper does not
    count, c a + c b. Relaxation, which it does not count either, is left out.

    Args:
      context: n, tokens a row; default the model's.
      shares: of a row that runs recursion r = 1..R; default `depth.shares`.
    """
    n = model.context if context is None else context
    heads, _, head_dim = model.dims
    a = 2.0 * (4 * model.width * heads * head_dim + 3 * model.width * model.mlp_width)
    b = 2.0 * heads * head_dim * (n + 1)
    layers = build_program(model)
    ends = layers.prelude + layers.coda
    projections = 4.0 * model.width * heads * head_dim  # of keys and values

    def step(r: int, c: float) -> float:
        if not looks_back(depth.kv_name):
            return c * a + c * c * b
        return c * (a + b) - (c * projections if r and depth.kv_name == SHARED else 0.0)

    return ends * (a + b) + layers.core * sum(
        step(r, c) for r, c in enumerate(shares or depth.shares(model))
    )


def paper_training_flops(cfg: Config, steps: int) -> float:
    """FLOPs of `steps` optimiser steps as the paper budgets them: forward only, so about a third of
    the true cost. Those of a depth warm-up (`model/depth/warmup.py`) cost what they run."""
    tokens = tokens_per_step(cfg)

    def of(shares: Sequence[float]) -> float:
        return tokens * paper_flops_per_token(cfg.model, cfg.depth, shares=shares)

    return sum(
        (s.last - s.first) * _mean(cfg, s.index, of) for s in stages(cfg.model, cfg.depth, steps)
    )


def true_training_flops(cfg: Config, steps: int) -> float:
    """FLOPs of `steps` optimiser steps, forward and backward, head and router included."""
    found = stages(cfg.model, cfg.depth, steps)
    ends = {s.last for s in found} | {last for _, last in cfg.train.length_changes(steps)}
    ends = sorted(end for end in ends if 0 < end <= steps)
    return sum(
        (last - first) * true_step_flops(cfg, last, steps)
        for first, last in itertools.pairwise([0, *ends])
    )


def true_step_flops(cfg: Config, step: int | None = None, steps: int = 0) -> float:
    """True FLOPs of optimiser step number `step` (from 1) of a run of `steps` (0: the
    configuration's); None: of one that is warm, its rows whole. Where depths are varied, the mean
    over them."""
    model = cfg.model
    if step is not None and cfg.train.lengths:
        length = cfg.train.row_length(step, steps or training_steps(cfg), model.context)
        model = dataclasses.replace(model, context=length)

    def of(shares: Sequence[float]) -> float:
        counts = program.active_counts(tuple(shares), model.context)
        return (
            tokens_per_step(cfg)
            * true_flops_per_token(
                model, cfg.depth, mean_counts=counts, recursion=cfg.recursion
            ).training
        )

    return _mean(cfg, None if step is None else stage_of(cfg.depth, step - 1), of)


def _mean(cfg: Config, stage: int | None, of: Callable[[Sequence[float]], float]) -> float:
    """What a step of this stage costs, by the shares it runs at; of a warm one, the mean over its
    depths."""
    if not is_warm(cfg.depth, stage):
        return of(shares_in(cfg.model, cfg.depth, stage))
    return sum(part * of(shares) for part, shares in mixture(cfg.model, cfg.depth))


def tokens_per_step(cfg: Config) -> int:
    """Tokens an optimiser step reads, over all devices and micro-batches."""
    return cfg.train.batch_size * cfg.model.context


def steps_for_flops(cfg: Config) -> int:
    """Optimiser steps that spend `config.train.flops`; rounded up, as in the paper's released
    configs.

    Raises:
      ConfigError: the budget is not positive.
    """
    if cfg.train.flops <= 0:
        raise ConfigError(
            f"config.train.flops must be positive to set the steps, got {cfg.train.flops:g}."
        )
    left = cfg.train.flops - paper_training_flops(cfg, cfg.depth.warmup)
    if left < 0 or (cfg.depth.warmup and not left):
        raise ConfigError(
            f"config.train.flops = {cfg.train.flops:g} ends within config.depth.warmup = {cfg.depth.warmup} steps: the "
            "model would never be trained as it is evaluated. Use fewer steps of warm-up."
        )
    warm = _mean(
        cfg,
        None,
        lambda shares: (
            tokens_per_step(cfg) * paper_flops_per_token(cfg.model, cfg.depth, shares=shares)
        ),
    )
    return max(1, cfg.depth.warmup + math.ceil(left / warm))


def training_steps(cfg: Config) -> int:
    """Optimiser steps of the run: `config.train.steps`, or those that spend
    `config.train.flops`."""
    return cfg.train.steps or steps_for_flops(cfg)


def true_flops_per_token(
    model: ModelConfig,
    depth: DepthConfig,
    *,
    mean_counts: Sequence[float] | None = None,
    recursion: RecursionConfig | None = None,
) -> TrueFlops:
    """Forward FLOPs a token, counted over the tokens that take part.

    Only useful work counts: a masked executor that computes halted tokens as well, or a kernel that
    computes both halves of the attention, shows up as a lower MFU and not as more FLOPs. Documents
    packed into one row are counted as one causal row. Where queries of some tokens look at the keys
    of all (shared, hybrid), those tokens are taken to lie evenly over the row.

    Args:
      mean_counts: tokens of a full row that ran recursion r = 1..R, e.g. measured under the
        threshold rule; default `active_counts`. Attention grows with the square of the count, so
        means over rows slightly undercount it.
      recursion: its matrix products count; sums and products of elements (a conditioning, a norm)
        do not, as everywhere here.
    Raises:
      ConfigError: `vocab_size` is still 0, or `mean_counts` is not one number a recursion.
    """
    t = model.context
    counts = _one_per_recursion(model, mean_counts, "mean_counts") or active_counts(model, depth)
    layers = build_program(model)
    ends = layers.prelude + layers.coda
    heads, _, head_dim = model.dims

    # Query-key pairs of a causal row of k tokens: k (k + 1) / 2; of k of them to all t: k (t + 1) /
    # 2. A pair costs 2 N H for its score and 2 N H for its share of the weighted sum.
    if looks_back(depth.kv_name):
        ran = (t, *counts[1:])  # step 1 makes everyone's keys, whoever goes on
        core_pairs = sum(k * (t + 1) / 2 for k in ran)
    else:
        ran = counts
        core_pairs = sum(k * (k + 1) / 2 for k in ran)
    pairs = ends * t * (t + 1) / 2 + layers.core * core_pairs
    layer_tokens = ends * t + layers.core * sum(ran)
    # applications that project no keys
    saved = layers.core * sum(ran[1:]) if depth.kv_name == SHARED else 0
    query, value = _lora_matrices(model)
    additions = layers.core * sum(ran) * (query + value)
    blocks = 2 * (
        _block_matrices(model) * layer_tokens + additions - (_kv_matrices(model) + value) * saved
    )
    attention, head = 4 * heads * head_dim * pairs / t, 2.0 * head_weights(model)
    router = build_policy(model, depth).counts(t, counts).flops / t
    c = recursion or RecursionConfig()
    beside = 2.0 * injection_matrices(model, depth, c) * sum(ran) / t
    forward = blocks / t + attention + head + router + beside
    steps = model.recursions
    # of one block outside of the recursion
    end = 2 * _block_matrices(model) + 4 * heads * head_dim * (t + 1) / 2
    core = (forward - head - ends * end) / steps
    return TrueFlops(
        blocks=blocks / t,
        attention=attention,
        head=head,
        router=router,
        training=_training(c, steps, (layers.prelude * end, core, layers.coda * end + head), model)
        if c.trains
        else 3 * forward,
        recursion=beside,
        exit=steps * {"head": head, "gate": 2.0 * model.width, "": 0.0}[exit_reads(c.exit)],
    )


def _training(
    c: RecursionConfig, recursions: int, parts: tuple[float, float, float], model: ModelConfig
) -> float:
    """FLOPs a token of a training step, forward and backward, where the recursions are more than a
    fixed number with the loss at the end. Steps before the last `gradient_steps` run forward alone.
    A loss over steps runs the coda and the head after each step that has a gradient, or each
    segment. Rows that wait
    for a longer one do no work that counts.

    Args:
      parts: forward FLOPs of the prelude, of a step over the core, of coda and head.
    """
    prelude, core, read = parts
    # All steps to a fixed point are counted; fewer run where it comes sooner. Then one more, and in
    # the backward pass one product with its derivative for each step of the adjoint.
    if c.solver != "none":
        return 3 * (prelude + core + read) + (recursions + 2 * c.adjoint_steps) * core
    calls = c.most(recursions) // c.segments
    window = c.gradient_steps or calls
    drawn = list(enumerate(probabilities(c, recursions), 1))
    if c.segments > 1:
        drawn = [(calls, float(c.segments))]  # of a fixed number of steps, each part on its own
    kept = sum(p * min(steps, window) for steps, p in drawn)
    free = sum(p * max(steps - window, 0) for steps, p in drawn)
    reads = 1.0 if c.loss == "final" else kept
    reads = float(c.segments) if c.segments > 1 else reads
    gate = 2.0 * model.width * kept if c.loss == "gate" else 0.0
    return 3 * (prelude + kept * core + reads * read + gate) + free * core


def injection_matrices(model: ModelConfig, depth: DepthConfig, c: RecursionConfig) -> int:
    """Matrix parameters that every step multiplies with beside the core."""
    beside = parameter_shapes(model, depth, c).get("recursion", {}) if c.reads else {}
    return _size(beside.get("injection", {}), _is_matrix)


def kv_bytes_per_token(
    model: ModelConfig,
    depth: DepthConfig,
    *,
    mean_active: Sequence[float] | None = None,
    bytes_per_value: int | None = None,
) -> float:
    """Bytes of keys and values that a token of context costs in the decode cache, averaged over
    tokens.

    The recursion-wise cache stores a token at depth r only if it ran depth r (paper section 2.2.2),
    so the core costs Σ_r share_r copies of its layers - (R+1)/2 at the default capacities. Shared
    keys cost one copy; full and hybrid, where every token has an entry at every depth, R. The
    layers before and after the recursion store every token. What is read is another count:
    `analysis/traffic.py`.

    Args:
      mean_active: share of tokens that ran recursion r = 1..R, e.g. measured in causal evaluation;
        default the capacities.
      bytes_per_value: default that of `model.dtype`.
    Raises:
      ConfigError: `mean_active` is not one number a recursion.
    """
    copies = sum(_one_per_recursion(model, mean_active, "mean_active") or depth.shares(model))
    copies = {"recursion_wise": copies, SHARED: 1}.get(depth.kv_name, model.recursions)
    layers = build_program(model)
    size = DTYPE_BYTES[model.dtype] if bytes_per_value is None else bytes_per_value
    return kv_values(model) * size * (layers.prelude + layers.coda + layers.core * copies)


def kv_bytes_of_depths(
    model: ModelConfig,
    depth: DepthConfig,
    depths: Sequence[int],
    *,
    bytes_per_value: int | None = None,
) -> list[float]:
    """Bytes in the decode cache after each token of a sequence, from the recursions each of them
    ran."""
    copies = {"recursion_wise": lambda ran: ran, SHARED: lambda ran: 1}.get(
        depth.kv_name, lambda ran: model.recursions
    )
    layers, total = build_program(model), 0.0
    value = kv_values(model) * (
        DTYPE_BYTES[model.dtype] if bytes_per_value is None else bytes_per_value
    )
    found = []
    for ran in depths:
        total += value * (layers.prelude + layers.coda + layers.core * copies(ran))
        found.append(total)
    return found


def kv_values(model: ModelConfig) -> int:
    """Numbers in the key and the value of one token in one block."""
    _, kv_heads, head_dim = model.dims
    return 2 * kv_heads * head_dim


def _kv_matrices(model: ModelConfig) -> int:
    """Parameters of one block's key and value projections: two of the G + 2 parts of the fused
    one."""
    heads, kv_heads, _ = model.dims
    return (
        _size(_leaf_shapes(nn.Block, model), lambda name: name == "qkv")
        * 2
        // (heads // kv_heads + 2)
    )


def _lora_matrices(model: ModelConfig) -> tuple[int, int]:
    """Parameters of one block's low-rank additions at one recursion, to the queries and to the
    values."""
    tree = _leaf_shapes(nn.Lora, model)

    def of(projection: str) -> int:
        return _size(tree, lambda name: name.startswith(projection))

    return of("query"), of("value")


def head_weights(model: ModelConfig) -> int:
    """Parameters of the table that the head multiplies with. Of the embedding a token reads one
    row."""
    return model.width * _vocabulary(model)


def block_weights_read(model: ModelConfig) -> int:
    """Matrix parameters that a token of full depth meets, a shared block once for each
    application."""
    layers = build_program(model)
    own = layers.core * layers.recursions * sum(_lora_matrices(model))
    return layers.unrolled_layers * _block_matrices(model) + own


def _block_matrices(model: ModelConfig) -> int:
    """Matrix parameters of one block; a token is multiplied with each once."""
    return _size(_leaf_shapes(nn.Block, model), _is_matrix)


def _vocabulary(model: ModelConfig) -> int:
    if not model.vocab_size:
        raise ConfigError(
            "config.model.vocab_size is 0, i.e. left to the tokenizer: the embedding and the head cannot be counted. "
            "Build the tokenizer first, or set it."
        )
    return model.vocab_size


def _one_per_recursion(
    model: ModelConfig, values: Sequence[float] | None, name: str
) -> tuple[float, ...]:
    """`values` as a tuple of R numbers; () for None."""
    if values is None:
        return ()
    if len(values) != model.recursions:
        raise ConfigError(f"{name} has {len(values)} entries for recursions = {model.recursions}.")
    return tuple(float(v) for v in values)
