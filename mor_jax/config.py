"""The typed configuration: frozen dataclasses, built from an `ml_collections.ConfigDict`, checked at the door.

A config file under `configs/` returns a ConfigDict with any subset of the fields below; `from_config_dict`
fills in the defaults, refuses unknown names (naming the nearest valid one) and contradictions, and returns a
`Config` whose parts are hashable and so usable as static arguments of `jax.jit`.

Nothing here touches a device or reads a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mor_jax.errors import ConfigError

SHARING = ("none", "cycle", "sequence", "middle_cycle", "middle_sequence")
POLICIES = ("fixed", "expert_choice", "token_choice", "random")
ROUTERS = ("linear", "mlp", "wide_mlp")
SCORES = ("sigmoid", "tanh", "softmax", "none")
GATES = ("multiplicative", "additive", "exit", "every", "constant")
EXECUTORS = ("gathered", "masked")
KV_STRATEGIES = ("full", "recursion_wise", "shared", "hybrid")
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "block", "dots", "dots_no_batch")
ATTENTION = ("blocked", "xla", "cudnn")
SCHEDULES = ("wsd", "cosine", "constant")
NORMS = ("shared", "own")
INFERENCE = ("threshold", "auxiliary", "calibrated")
SOURCES = ("pystdlib", "files", "tfds")
BAD_STEP = ("skip", "rewind", "stop")

# Which KV strategies each depth policy knows (model/kv.py says what they are); the first is its default ("" in a
# config). Under a routed policy a token that stopped at recursion r has no keys deeper than r, so "full" (every token
# stored at every depth) cannot exist; under the fixed one nothing is ever missing, so "recursion_wise" and "hybrid"
# would be "full".
_ROUTED_KV = ("recursion_wise", "shared", "hybrid")
KV_OF_POLICY = {
    "fixed": ("full", "shared"),
    "expert_choice": _ROUTED_KV,
    "token_choice": _ROUTED_KV,
    "random": _ROUTED_KV,
}
# Policies that have a router, and policies that fill capacities row by row in training.
WITH_ROUTER = ("expert_choice", "token_choice")
WITH_CAPACITIES = ("expert_choice", "random")
# Which score function and which gate each routed policy knows; the first of each is its default ("" in a config).
SCORES_OF_POLICY = {
    "fixed": (),
    "expert_choice": ("sigmoid", "tanh", "none"),
    "token_choice": ("softmax", "sigmoid"),
    "random": (),
}
GATES_OF_POLICY = {
    "fixed": (),
    "expert_choice": ("multiplicative", "additive"),
    "token_choice": ("exit", "every"),
    "random": ("constant", "additive"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network. Letters in array names: B batch, T time, D width, N heads, K kv heads, H head
    dim, F mlp width, V vocabulary, R recursions."""

    layers: int = 8  # unrolled depth: every application of a shared block counts
    recursions: int = 1  # R, times the core is applied
    sharing: str = "none"  # none (R = 1 only) | cycle | sequence | middle_cycle | middle_sequence
    prelude: int = -1  # blocks of their own before the recursion; -1: the scheme's (1 in the middle schemes, else 0)
    coda: int = -1  # and after it
    width: int = 256  # D
    heads: int = 4  # N, query heads
    kv_heads: int = 4  # K, divides heads
    head_dim: int = 0  # H, even; 0: width // heads
    mlp_width: int = 704  # F
    vocab_size: int = 0  # V; 0: the tokenizer's size rounded up to a multiple of 64
    context: int = 512  # tokens; training row length and longest sequence at inference
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02  # of every matrix, the router included
    dtype: str = "float32"  # of matrix products; parameters, softmax, router and loss stay float32
    # Relaxation: what each recursion has of its own in the shared core (cycle schemes).
    norms: str = "shared"  # of the core's blocks: shared | own
    lora_rank: int = 0  # of an addition to the query and value projections; 0: none
    recursion_encoding: bool = False  # a learned factor, at first 1, on each dimension of the state it reads
    remat: str = "none"  # none | block | dots | dots_no_batch
    attention: str = "blocked"  # blocked | xla (the oracle) | cudnn (NVIDIA GPUs, bfloat16)
    loss_chunk: int = 128  # positions whose logits exist at once; 0: all

    @property
    def relaxed(self) -> bool:
        """Whether recursions have something of their own."""
        return self.norms == "own" or self.lora_rank > 0 or self.recursion_encoding

    @property
    def dims(self) -> tuple[int, int, int]:
        """(N, K, H)"""
        return self.heads, self.kv_heads, self.head_dim or self.width // self.heads


@dataclass(frozen=True)
class DepthConfig:
    """How often each token recurses."""

    policy: str = "fixed"  # fixed | expert_choice | token_choice | random (of the same capacities as expert_choice)
    router: str = "linear"  # linear | mlp (hidden 2D) | wide_mlp (hidden 4D)
    score: str = ""  # "": the policy's default. expert_choice: sigmoid | tanh | none; token_choice: softmax | sigmoid
    # expert_choice: multiplicative | additive (score dropped); token_choice: exit (code) | every (eq. 2.2); random:
    # constant (alpha) | additive
    gate: str = ""
    alpha: float = 0.0  # scale of the gate, alpha * score; 0: the paper's, 0.1 (1 for softmax)
    temperature: float = 1.0  # the hidden state is divided by it before the router
    z_loss_weight: float = 0.0  # of mean(logsumexp(z)^2)
    seed: int = 0  # random: of the draws
    # expert_choice, random
    capacities: tuple[float, ...] = ()  # share of the row kept at r = 1..R; (): (R-r+1)/R
    aux_loss_weight: float = 0.001  # of the router's BCE, summed over r; same under any accumulation
    threshold: float = 0.5  # causal inference: continue while sigmoid(z) >= threshold
    # What causal inference under expert_choice goes by: threshold (the router's own score, taught by the BCE) |
    # auxiliary (a second router on the detached state, taught by the BCE in place of the first; same threshold) |
    # calibrated (the router's score, against the thresholds that its survey finds for `capacities`)
    inference: str = "threshold"
    aux_lr: float = 10.0  # auxiliary: learning rate of the second router, over the model's
    # token_choice
    balance_loss_weight: float = 0.1  # of R * sum_i F_i P_i
    bias_rate: float = 0.0  # loss-free balancing: step of the selection bias after each optimiser step; 0: off
    buckets: int = 4  # gathered: sizes a step may take at run time; the last holds every token, so none is dropped
    executor: str = "gathered"  # training: gathered (fast) | masked (oracle)
    # Optimiser steps of depth warm-up; 0: none. expert_choice, random: capacities fall from 1 to their target along a
    # half cosine, in `warmup_stages` equal strides; token_choice: every token at full depth, balance suspended.
    warmup: int = 0
    warmup_stages: int = 4  # each is a program to compile
    # Share of the warm steps that train at another mean depth, `vary_depths` of them evenly from 1 to R; 0: none. A model that has seen other depths can be dialled to them (`model/depth/vary.py`).
    vary: float = 0.0
    vary_depths: int = 5  # each is a program to compile
    tile: int = 1  # tokens; row sizes of recursion steps are rounded to multiples of it (128 or 256 suit an H100)
    # Whose keys a recursion step sees, in training and in decoding. fixed: full | shared; routed: recursion_wise |
    # shared (made once, at r = 1) | hybrid (renewed by the tokens that go on); "": the policy's first.
    kv: str = ""

    @property
    def score_name(self) -> str:
        return self.score or next(iter(SCORES_OF_POLICY[self.policy]), "")

    @property
    def gate_name(self) -> str:
        return self.gate or next(iter(GATES_OF_POLICY[self.policy]), "")

    @property
    def kv_name(self) -> str:
        return self.kv or KV_OF_POLICY[self.policy][0]

    @property
    def gate_scale(self) -> float:
        return self.alpha or (1.0 if self.score_name == "softmax" else 0.1)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    source: str = "pystdlib"  # pystdlib | files | tfds
    paths: tuple[str, ...] = ()  # files: globs; tfds: the directory of a prepared data set
    name: str = ""  # tfds: data set name, e.g. "wiki40b/en"
    split: str = "train"  # tfds
    text_key: str = "text"  # jsonl, parquet, tfds: the field that holds the text
    tokenizer: str = "bytes"  # bytes | bpe | path of a tokenizer.json
    bpe_vocab: int = 4096  # bpe: vocabulary size, special tokens included
    holdout: float = 0.05  # share of documents held out for evaluation
    cache_dir: str = ""  # prepared rows; "": $MOR_JAX_CACHE or ~/.cache/mor_jax
    seed: int = 0  # of the global shuffle


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with clipping and a schedule."""

    schedule: str = "wsd"  # wsd | cosine | constant
    peak_lr: float = 3e-3
    warmup: float = 0.05  # share of all steps
    decay: float = 0.2  # wsd: share of all steps in the linear cool-down
    final_lr: float = 0.0  # share of peak_lr at the end
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only; norms have none
    clip_norm: float = 1.0  # of the global gradient norm; 0: off


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    steps: int = 0  # optimiser steps; 0: as many as `flops` pays for
    flops: float = 0.0  # training budget, FLOPs after the paper's accounting; used when steps is 0
    batch_size: int = 32  # global rows a step; divisible by accum and by data * fsdp
    accum: int = 1  # micro-batches a step
    seed: int = 0  # of the initialisation
    log_every: int = 10  # steps
    eval_every: int = 200  # steps; 0: at the end only
    eval_rows: int = 128  # held-out rows an evaluation reads; 0: all
    checkpoint_every: int = 200  # steps; 0: at the end only
    keep_checkpoints: int = 3
    # Bad steps never change the weights (train/faults.py): skip | rewind to the last checkpoint, and other rows | stop
    on_nonfinite: str = "stop"  # loss, gradient or update is not finite
    on_spike: str = "skip"
    spike_threshold: float = 0.0  # nats above the median of the last 64 steps that are a loss spike; 0: none is


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh and the logical-to-mesh rules. One axis may be -1: whatever is left."""

    data: int = -1  # copies of the weights, each with rows of its own; slices times something
    fsdp: int = 1  # rows here too, weights cut; divides width
    tensor: int = 1  # heads, mlp and vocabulary cut; divides kv_heads, mlp_width, vocab_size
    sequence: int = 1  # each row cut along time; divides context
    slices: int = 1  # parts of `data` that only the data centre's network (DCN) joins
    rules: tuple[tuple[str, str], ...] = ()  # overrides of `parallel.rules.DEFAULT_RULES`


@dataclass(frozen=True)
class Config:
    """Everything a run is made of. `name` labels it in reports."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (JSON-ready); `from_dict` is its inverse."""
        return dataclasses.asdict(self)


def from_config_dict(config: Mapping[str, Any], *, devices: int = 1) -> Config:
    """Build and check a `Config`.

    Args:
      config: a ConfigDict or a nested dict with any subset of the fields.
      devices: number of devices the mesh will span.
    Raises:
      ConfigError: an unknown field, a wrong type, or values that do not go together.
    """
    raw = config.to_dict() if hasattr(config, "to_dict") else config
    cfg = from_dict(raw)
    check(cfg, devices=devices)
    return cfg


def from_dict(raw: Mapping[str, Any]) -> Config:
    """Build a `Config` without the cross-field checks (used for configs read back from a checkpoint)."""
    return _build(Config, raw, "config")


def _build(cls: type, raw: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(_unknown(key, where, hints))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{key} must be a group of fields, got {value!r}.")
            values[key] = _build(hint, value, f"{where}.{key}")
        else:
            values[key] = _coerce(value, hint, f"{where}.{key}")
    return cls(**values)


def _unknown(key: str, where: str, hints: Mapping[str, Any]) -> str:
    """Message for a field that does not exist: the nearest valid name, wherever in the tree it lives."""
    for group, cls in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls) and key in typing.get_type_hints(cls):
            return f"{where}.{key} does not exist. Did you mean config.{group}.{key}?"
    near = difflib.get_close_matches(key, hints, n=1)
    if near:
        return f"{where}.{key} does not exist. Did you mean {where}.{near[0]}?"
    return f"{where}.{key} does not exist. Valid fields of {where}: {', '.join(hints)}."


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Check a leaf against its annotation; int is accepted for float, list for tuple, str for a 1-tuple."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        args = typing.get_args(hint)
        if isinstance(value, str) and args[0] is str:
            value = (value,) if value else ()
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a tuple, got {value!r}.")
        if len(args) == 2 and args[1] is Ellipsis:
            args = (args[0],) * len(value)
        if len(args) != len(value):
            raise ConfigError(f"{where} must have {len(args)} entries, got {value!r}.")
        return tuple(_coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
            return value
        raise ConfigError(f"{where} must be {hint.__name__}, got {type(value).__name__} {value!r}.")
    raise ConfigError(f"{where}: cannot check {value!r} against {hint}.")


def check(cfg: Config, *, devices: int = 1) -> None:
    """Raise ConfigError for the first value or combination of values that cannot be run."""
    _check_model(cfg.model)
    _check_depth(cfg.model, cfg.depth)
    _check_data(cfg.data)
    _check_train(cfg)
    _check_mesh(cfg, devices)


def _one_of(where: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where} must be one of {', '.join(valid)}; got {value!r}.{hint}")


def _positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{where}.{name} must be positive, got {value}.")


def _check_model(m: ModelConfig) -> None:
    where = "config.model"
    _one_of(f"{where}.sharing", m.sharing, SHARING)
    _one_of(f"{where}.dtype", m.dtype, DTYPES)
    _one_of(f"{where}.remat", m.remat, REMAT)
    _one_of(f"{where}.attention", m.attention, ATTENTION)
    _positive(
        where, layers=m.layers, recursions=m.recursions, width=m.width, heads=m.heads, kv_heads=m.kv_heads,
        mlp_width=m.mlp_width, context=m.context, rope_theta=m.rope_theta, norm_eps=m.norm_eps, init_std=m.init_std,
    )  # fmt: skip
    if m.vocab_size < 0 or m.loss_chunk < 0 or m.head_dim < 0:
        raise ConfigError(f"{where}: vocab_size, loss_chunk and head_dim must not be negative.")
    if m.heads % m.kv_heads:
        fits = [k for k in range(1, m.heads + 1) if m.heads % k == 0]
        raise ConfigError(
            f"{where}.kv_heads = {m.kv_heads} does not divide heads = {m.heads}; grouped-query attention needs "
            f"equal groups. kv_heads that fit: {', '.join(map(str, fits))}."
        )
    if not m.head_dim and m.width % m.heads:
        raise ConfigError(
            f"{where}.width = {m.width} is not divisible by heads = {m.heads}; set {where}.head_dim or change one of them."
        )
    if m.dims[2] % 2:
        raise ConfigError(f"{where}: the head dimension is {m.dims[2]}; rotary embedding needs an even one.")
    if m.attention == "cudnn" and m.dtype != "bfloat16":
        raise ConfigError(
            f"{where}.attention = 'cudnn' runs in half precision only, but {where}.dtype = {m.dtype!r}. Use dtype = "
            "'bfloat16', or attention = 'blocked'."
        )
    if m.prelude < -1 or m.coda < -1:
        raise ConfigError(f"{where}.prelude and .coda count blocks; -1 leaves them to the sharing scheme.")
    if m.sharing == "none" and max(m.prelude, m.coda) > 0:
        raise ConfigError(
            f"{where}.sharing = 'none' shares nothing, so {where}.prelude and .coda mean nothing; remove them, or "
            "choose sharing = 'cycle'."
        )
    if m.sharing == "none" and m.recursions != 1:
        raise ConfigError(
            f"{where}.sharing = 'none' has nothing to recurse over, but recursions = {m.recursions}. "
            "Use sharing = 'middle_cycle' (or 'cycle'), or recursions = 1."
        )
    _check_relaxation(m)
    ends = sum(unshared_ends(m))
    inner = m.layers - ends
    if inner < m.recursions or inner % m.recursions:
        per = max(1, inner // m.recursions)
        fits = sorted({ends + m.recursions * k for k in (per - 1, per, per + 1) if k >= 1})
        raise ConfigError(
            f"{where}.layers = {m.layers} cannot be {m.sharing} with recursions = {m.recursions}: "
            f"layers - {ends} unshared must be a multiple of {m.recursions}. Layer counts near it that fit: "
            f"{', '.join(map(str, fits))}."
        )


def _check_relaxation(m: ModelConfig) -> None:
    where = "config.model"
    _one_of(f"{where}.norms", m.norms, NORMS)
    if m.lora_rank < 0:
        raise ConfigError(f"{where}.lora_rank must not be negative, got {m.lora_rank}; 0 means none.")
    in_place = m.sharing.endswith("sequence")
    if not m.relaxed or (m.recursions > 1 and not in_place):
        return
    given = {"norms": m.norms == "own", "lora_rank": m.lora_rank > 0, "recursion_encoding": m.recursion_encoding}
    name = next(name for name, on in given.items() if on)
    why = f"sharing = {m.sharing!r} repeats each block in place" if in_place else "recursions = 1 shares nothing"
    raise ConfigError(
        f"{where}.{name} = {getattr(m, name)!r} gives each recursion over a shared core something of its own, but {why}. "
        "Remove it, or use sharing = 'middle_cycle' (or 'cycle') with recursions of 2 or more."
    )


def unshared_ends(m: ModelConfig) -> tuple[int, int]:
    """Blocks before and after the recursion: the first and the last in the middle schemes (paper, table 1), or as
    many as `prelude` and `coda` say."""
    scheme = 1 if m.sharing.startswith("middle_") else 0
    return (scheme if m.prelude < 0 else m.prelude), (scheme if m.coda < 0 else m.coda)


def _check_depth(m: ModelConfig, d: DepthConfig) -> None:
    where = "config.depth"
    _one_of(f"{where}.policy", d.policy, POLICIES)
    _one_of(f"{where}.executor", d.executor, EXECUTORS)
    _check_kv(m, d)
    _one_of(f"{where}.router", d.router, ROUTERS)
    for name, value, of_policy in (("score", d.score, SCORES_OF_POLICY), ("gate", d.gate, GATES_OF_POLICY)):
        if value:
            _one_of(f"{where}.{name}", value, SCORES if name == "score" else GATES)
            fits = of_policy[d.policy]
            if value not in fits:
                valid = " or ".join(map(repr, fits)) or "leave it empty (nothing is routed)"
                raise ConfigError(f"{where}.{name} = {value!r} does not go with policy {d.policy!r}: {valid}.")
    _positive(where, temperature=d.temperature)
    for name in ("alpha", "aux_loss_weight", "balance_loss_weight", "z_loss_weight", "bias_rate"):
        if not (getattr(d, name) >= 0 and math.isfinite(getattr(d, name))):
            raise ConfigError(f"{where}.{name} must be a number and not negative, got {getattr(d, name)}.")
    if d.policy not in WITH_ROUTER:
        for name, value, none in (("router", d.router, "linear"), ("z_loss_weight", d.z_loss_weight, 0.0)):
            if value != none:
                raise ConfigError(
                    f"{where}.{name} = {value!r} is of a router, but policy {d.policy!r} has none. Remove it, or use "
                    "policy 'expert_choice' or 'token_choice'."
                )
    for name in ("buckets", "warmup_stages", "vary_depths", "tile"):
        if getattr(d, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, got {getattr(d, name)}.")
    if d.warmup < 0:
        raise ConfigError(f"{where}.warmup counts optimiser steps and must not be negative, got {d.warmup}.")
    if d.warmup and d.policy == "fixed":
        raise ConfigError(
            f"{where}.warmup = {d.warmup} lets depth come down to what is routed, but policy 'fixed' routes nothing. "
            "Remove it, or choose another policy."
        )
    if not 0 <= d.vary <= 1:
        raise ConfigError(f"{where}.vary is a share of the steps and must be in [0, 1], got {d.vary}.")
    if d.vary and d.policy == "fixed":
        raise ConfigError(
            f"{where}.vary = {d.vary} varies what is routed, but policy 'fixed' routes nothing. Remove it."
        )
    if d.vary and d.vary_depths < 2:
        raise ConfigError(f"{where}.vary_depths = {d.vary_depths} is one depth, 1; give at least 2.")
    if d.tile > m.context:
        raise ConfigError(f"{where}.tile = {d.tile} is more than a row, config.model.context = {m.context} tokens.")
    _one_of(f"{where}.inference", d.inference, INFERENCE)
    _positive(where, aux_lr=d.aux_lr)
    if d.inference != "threshold" and d.policy != "expert_choice":
        raise ConfigError(
            f"{where}.inference = {d.inference!r} stands in for a top-k choice that sees the future; policy {d.policy!r} "
            "decides in training as at inference. Remove it, or use policy 'expert_choice'."
        )
    if d.inference == "auxiliary" and not d.aux_loss_weight:
        raise ConfigError(
            f"{where}.inference = 'auxiliary' goes by a router that only the auxiliary loss teaches, but "
            f"{where}.aux_loss_weight = 0. Set it, or use inference = 'calibrated'."
        )
    if d.bias_rate and d.policy != "token_choice":
        raise ConfigError(
            f"{where}.bias_rate = {d.bias_rate} balances depths that tokens choose; under policy {d.policy!r} capacities "
            "do. Remove it, or use policy 'token_choice'."
        )
    if d.policy != "fixed" and m.sharing.endswith("sequence"):
        raise ConfigError(
            f"{where}.policy = {d.policy!r} routes tokens between repetitions of the whole core, but "
            f"config.model.sharing = {m.sharing!r} repeats each block in place. Use cycle or middle_cycle."
        )
    if not 0 < d.threshold < 1:
        raise ConfigError(
            f"{where}.threshold must be between 0 and 1 (it is compared with a sigmoid), got {d.threshold}."
        )
    if d.capacities:
        if d.policy not in WITH_CAPACITIES:
            why = "sends every token through every recursion" if d.policy == "fixed" else "lets each token choose"
            raise ConfigError(
                f"{where}.capacities is set, but policy {d.policy!r} {why}. Use policy 'expert_choice' or 'random', or remove it."
            )
        if len(d.capacities) != m.recursions:
            raise ConfigError(f"{where}.capacities has {len(d.capacities)} entries for recursions = {m.recursions}.")
        if not all(0 < c <= 1 for c in d.capacities):
            raise ConfigError(f"{where}.capacities must lie in (0, 1], got {d.capacities}.")
        if any(b > a for a, b in zip(d.capacities, d.capacities[1:], strict=False)):
            raise ConfigError(
                f"{where}.capacities must not increase (a dropped token never re-enters), got {d.capacities}."
            )


def _check_kv(m: ModelConfig, d: DepthConfig) -> None:
    where = f"config.depth.kv = {d.kv!r}"
    if not d.kv:
        return
    _one_of("config.depth.kv", d.kv, KV_STRATEGIES)
    fits = KV_OF_POLICY[d.policy]
    if d.kv not in fits:
        why = (
            "a token that stops early has no keys at deeper recursions"
            if d.kv == "full"
            else "every token runs every recursion"
        )
        raise ConfigError(f"{where} does not go with policy {d.policy!r} ({why}). Use {' or '.join(map(repr, fits))}.")
    if d.kv not in ("shared", "hybrid"):
        return
    if m.sharing == "none":
        raise ConfigError(
            f"{where} uses keys of the first recursion again, but config.model.sharing = 'none' has one recursion. "
            "Remove it, or choose sharing = 'middle_cycle' or 'cycle'."
        )
    if m.sharing.endswith("sequence"):
        raise ConfigError(
            f"{where} uses keys of the first run through the whole core again, but config.model.sharing = "
            f"{m.sharing!r} repeats each block in place. Use cycle or middle_cycle, or kv = 'full'."
        )
    if d.policy in WITH_CAPACITIES and d.capacities and d.capacities[0] < 1:
        raise ConfigError(
            f"{where} needs the keys of all tokens from recursion 1, but config.depth.capacities starts at "
            f"{d.capacities[0]}: the others would have none. Start it at 1.0, or use kv = 'recursion_wise'."
        )


def _check_data(d: DataConfig) -> None:
    where = "config.data"
    _one_of(f"{where}.source", d.source, SOURCES)
    if d.source == "files" and not d.paths:
        raise ConfigError(
            f"{where}.source = 'files' needs {where}.paths, e.g. --config.data.paths=\"('corpus/*.jsonl.gz',)\"."
        )
    if d.source == "tfds" and not (d.name or d.paths):
        raise ConfigError(
            f"{where}.source = 'tfds' needs {where}.name (a prepared data set) or its directory in {where}.paths."
        )
    if not 0 < d.holdout < 1:
        raise ConfigError(f"{where}.holdout must be a share between 0 and 1, got {d.holdout}.")
    if d.bpe_vocab < 258:
        raise ConfigError(
            f"{where}.bpe_vocab = {d.bpe_vocab} cannot hold the 256 bytes and 2 special tokens; give at least 258."
        )


def _check_train(cfg: Config) -> None:
    t, o = cfg.train, cfg.optim
    _one_of("config.optim.schedule", o.schedule, SCHEDULES)
    _positive("config.optim", peak_lr=o.peak_lr, eps=o.eps)
    for name, value in (("b1", o.b1), ("b2", o.b2)):
        if not 0 <= value < 1:
            raise ConfigError(f"config.optim.{name} must be in [0, 1), got {value}.")
    for name, value in (("warmup", o.warmup), ("decay", o.decay), ("final_lr", o.final_lr)):
        if not 0 <= value <= 1:
            raise ConfigError(f"config.optim.{name} is a share and must be in [0, 1], got {value}.")
    if o.schedule == "wsd" and o.warmup + o.decay > 1:
        raise ConfigError(f"config.optim: warmup {o.warmup} and decay {o.decay} together exceed the run.")
    if o.clip_norm < 0 or o.weight_decay < 0:
        raise ConfigError("config.optim: clip_norm and weight_decay must not be negative.")
    if 0 < t.steps <= cfg.depth.warmup:
        raise ConfigError(
            f"config.depth.warmup = {cfg.depth.warmup} is the whole run, config.train.steps = {t.steps}: the model would "
            "never be trained as it is evaluated. Use fewer steps of warm-up."
        )
    if t.steps < 0 or t.flops < 0 or t.steps == t.flops == 0:
        raise ConfigError(
            f"config.train: give steps, or flops to derive them from; got steps = {t.steps}, flops = {t.flops:g}."
        )
    _positive(
        "config.train",
        batch_size=t.batch_size,
        accum=t.accum,
        log_every=t.log_every,
        keep_checkpoints=t.keep_checkpoints,
    )
    if min(t.eval_every, t.eval_rows, t.checkpoint_every, t.seed, cfg.data.seed) < 0:
        raise ConfigError("config.train: eval_every, eval_rows, checkpoint_every and the seeds must not be negative.")
    _one_of("config.train.on_nonfinite", t.on_nonfinite, BAD_STEP)
    _one_of("config.train.on_spike", t.on_spike, BAD_STEP)
    if not (t.spike_threshold >= 0 and math.isfinite(t.spike_threshold)):
        raise ConfigError(f"config.train.spike_threshold must be a number and not negative, got {t.spike_threshold}.")
    if t.batch_size % t.accum:
        raise ConfigError(
            f"config.train.batch_size = {t.batch_size} rows cannot be split into accum = {t.accum} micro-batches; "
            f"nearest that can: {_nearest_multiples(t.batch_size, t.accum)}."
        )


class MeshShape(NamedTuple):
    """Sizes of the mesh axes in device order: neighbours first differ in `tensor`, which talks the most."""

    data: int
    fsdp: int
    sequence: int
    tensor: int


def mesh_shape(mesh: MeshConfig, devices: int) -> MeshShape:
    """The axes with -1 replaced. Raises ConfigError when the product is not `devices`."""
    sizes = [mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor]
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise ConfigError(
            f"config.mesh axes must be positive, at most one of them -1; got data, fsdp, sequence, tensor = {sizes}."
        )
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        if devices % known:
            raise ConfigError(f"config.mesh: {devices} devices cannot be divided by the given axes (product {known}).")
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ConfigError(
            f"config.mesh data x fsdp x sequence x tensor = {' x '.join(map(str, sizes))} = {math.prod(sizes)}, "
            f"but there are {devices} devices."
        )
    if mesh.slices < 1 or sizes[0] % mesh.slices:
        raise ConfigError(
            f"config.mesh.slices = {mesh.slices} does not divide config.mesh.data = {sizes[0]}: slices are joined along "
            "data alone, since only gradients may cross the slow network between them."
        )
    return MeshShape(*sizes)


def _nearest_multiples(value: int, of: int) -> str:
    low = value // of * of
    return ", ".join(str(v) for v in (low, low + of) if v > 0)


def _check_mesh(cfg: Config, devices: int) -> None:
    data, fsdp, sequence, tensor = mesh_shape(cfg.mesh, devices)
    rows = cfg.train.batch_size // cfg.train.accum
    if rows % (data * fsdp):
        raise ConfigError(
            f"config.train.batch_size / accum = {rows} rows a micro-batch cannot be divided over data x fsdp = {data * fsdp} "
            f"devices; batch sizes near it that can: {_nearest_multiples(cfg.train.batch_size, data * fsdp * cfg.train.accum)}; "
            f"data x fsdp that can: {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}."
        )
    m = cfg.model
    if m.context % sequence:
        raise ConfigError(
            f"config.model.context = {m.context} is not divisible by config.mesh.sequence = {sequence}; rows are cut "
            "along time in equal parts."
        )
    if m.width % fsdp:
        raise ConfigError(f"config.model.width = {m.width} is not divisible by config.mesh.fsdp = {fsdp}.")
    for name, value in (("kv_heads", m.kv_heads), ("mlp_width", m.mlp_width), ("vocab_size", m.vocab_size)):
        if value % tensor:
            raise ConfigError(f"config.model.{name} = {value} is not divisible by config.mesh.tensor = {tensor}.")
