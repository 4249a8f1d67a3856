"""The fields of a configuration, their defaults, and the words that some of them take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

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
DEDUP = ("none", "holdout", "all")
BAD_RECORDS = ("stop", "skip")

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
    paths: tuple[str, ...] = ()  # files: globs, also gs:// and s3://; tfds: the directory of a prepared data set
    name: str = ""  # tfds: data set name, e.g. "wiki40b/en"
    split: str = "train"  # tfds
    text_key: str = "text"  # jsonl, parquet, tfds: the field that holds the text
    bad_records: str = "stop"  # stop | skip, with a count: records of jsonl and parquet files without a text
    tokenizer: str = "bytes"  # bytes | bpe | path of a tokenizer.json
    bpe_vocab: int = 4096  # bpe: vocabulary size, special tokens included
    holdout: float = 0.05  # share of documents held out for evaluation
    # Texts that occur more than once: none (keep all) | holdout (no held-out text in training) | all (one copy of each)
    dedup: str = "holdout"
    cache_dir: str = ""  # prepared rows, also gs:// or s3://; "": $MOR_JAX_CACHE or ~/.cache/mor_jax
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
