"""The fields of a configuration, their defaults, and the words that some of them take (depth:
`config/depth.py`)."""

from __future__ import annotations

from dataclasses import dataclass

SHARING = ("none", "cycle", "sequence", "middle_cycle", "middle_sequence")
DTYPES = ("float32", "bfloat16")
NORM_PLACEMENTS = ("pre", "sandwich_in", "sandwich_out", "post")
REMAT = ("none", "block", "dots", "dots_no_batch")
SCAN_LAYERS = ("auto", "on", "off")
ATTENTION = ("blocked", "xla", "cudnn", "splash", "auto")
SCHEDULES = ("wsd", "cosine", "constant")
ALGORITHMS = ("adamw", "muon")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
NORMS = ("shared", "own")
SOURCES = ("pystdlib", "files", "tfds")
BAD_STEP = ("skip", "rewind", "stop")
FORMATS = ("text", "chat", "preference")
DEDUP = ("none", "holdout", "all")
TARGETS = ("qkv", "out", "gate_up", "down")
BAD_RECORDS = ("stop", "skip")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network. Letters in array names: B batch, T time, D width, N heads, K kv heads,
    H head dim, F mlp width, V vocabulary, R recursions."""

    layers: int = 8  # unrolled depth: every application of a shared block counts
    recursions: int = 1  # R, times the core is applied
    sharing: str = "none"  # none (R = 1 only) | cycle | sequence | middle_cycle | middle_sequence
    # blocks of their own before the recursion; -1: the scheme's (1 in the middle schemes, else 0)
    prelude: int = -1
    coda: int = -1  # and after it
    # cores with weights of their own. recursion.inner > 0: 2 gives the two states one each (HRM);
    # else recursion r applies the r-th of them, and those after the last the first again
    networks: int = 1
    width: int = 256  # D
    heads: int = 4  # N, query heads
    kv_heads: int = 4  # K, divides heads
    head_dim: int = 0  # H, even; 0: width // heads
    mlp_width: int = 704  # F
    vocab_size: int = 0  # V; 0: the tokenizer's size rounded up to a multiple of 64
    context: int = 512  # tokens; training row length and longest sequence at inference
    rope_theta: float = 10_000.0
    # Rotary embedding for contexts beyond the one a model was first trained at (nn/rope.py)
    rope_scaling: str = "none"  # none | linear | llama3 | yarn
    rope_factor: float = 1.0  # by which the context grew
    rope_original_context: int = 0  # tokens, before; llama3, yarn
    # llama3: wavelengths in the original context at and below which all is scaled
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0  # llama3: and at and above which nothing is
    rope_beta_slow: float = 1.0  # yarn: turns over the original context at which all is scaled
    rope_beta_fast: float = 32.0  # yarn: and at which nothing is
    rope_attention_factor: float = 0.0  # yarn: factor on cos and sin; 0: 0.1 ln(rope_factor) + 1
    norm_eps: float = 1e-5
    qkv_bias: bool = False  # a bias on queries, keys and values, as in Qwen2
    # RMSNorm of each head's query and key before they are rotated, as in Qwen3
    qk_norm: bool = False
    tied: bool = True  # the head reads the embedding's table; False: a table of its own
    # Where a block's norms stand (model/block.py): pre | sandwich_in (a second norm on each branch,
    # Ouro) | sandwich_out (a second norm after each addition, Huginn) | post (after each addition,
    # none before)
    norm_placement: str = "pre"
    # first value of a learned factor on each dimension of each branch; 0: none
    layer_scale: float = 0.0
    smear: int = (
        # previous tokens whose embeddings are mixed into each token's own, which makes copying
        # cheap to learn
        0
    )
    logit_cap: float = 0.0  # soft cap of the logits: cap * tanh(logits / cap); 0: none
    init_std: float = 0.02  # of every matrix, the router included
    dtype: str = "float32"  # of matrix products; parameters, softmax, router and loss stay float32
    # Relaxation: what each recursion has of its own in the shared core (cycle schemes).
    norms: str = "shared"  # of the core's blocks: shared | own
    lora_rank: int = 0  # of an addition to the query and value projections; 0: none
    # a learned factor, at first 1, on each dimension of the state it reads
    recursion_encoding: bool = False
    # every token sees all of its document, also later ones: puzzles, not text (xla attention)
    bidirectional: bool = False
    remat: str = "none"  # none | block | dots | dots_no_batch
    # blocked | xla (the oracle) | cudnn (NVIDIA GPUs, bfloat16) | splash (TPUs) | auto (what suits
    # the backend)
    attention: str = "blocked"
    loss_chunk: int = 128  # positions whose logits exist at once; 0: all
    # Blocks of a part as one loop in training, so that large models compile in minutes: auto (on
    # TPUs, parts of 4 blocks or more; measured in docs/pods.md) | on | off (unrolled)
    scan_layers: str = "auto"

    @property
    def relaxed(self) -> bool:
        """Whether recursions have something of their own."""
        return self.norms == "own" or self.lora_rank > 0 or self.recursion_encoding

    @property
    def dims(self) -> tuple[int, int, int]:
        """(N, K, H)"""
        return self.heads, self.kv_heads, self.head_dim or self.width // self.heads


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    source: str = "pystdlib"  # pystdlib | files | tfds
    # files: globs, also gs:// and s3://; tfds: the directory of a prepared data set
    paths: tuple[str, ...] = ()
    # files: several sources, each (globs joined by commas, weight), in place of paths; weights are
    # shares of the rows
    mixture: tuple[tuple[str, float], ...] = ()
    name: str = ""  # tfds: data set name, e.g. "wiki40b/en"
    split: str = "train"  # tfds
    # text | chat (each record a list of messages with role and content) | preference (each record
    # two of them, `chosen` and `rejected`)
    format: str = "text"
    # jsonl, parquet, tfds: field of the text or the messages; "": "text", or "messages" for chat
    text_key: str = ""
    # chat: plain | chatml | path of a Jinja file; "": the tokenizer's own, else plain
    chat_template: str = ""
    # chat: of rlm_runtime, that the conversations are in; travels with the weights
    prompt_variant: str = ""
    train_roles: tuple[str, ...] = ("assistant",)  # chat: roles whose messages have a loss
    # stop | skip, with a count: records of jsonl and parquet files without a text
    bad_records: str = "stop"
    tokenizer: str = "bytes"  # bytes | bpe | path of a tokenizer.json
    bpe_vocab: int = 4096  # bpe: vocabulary size, special tokens included
    holdout: float = 0.05  # share of documents held out for evaluation
    # Texts that occur more than once: none (keep all) | holdout (no held-out text in training) |
    # all (one copy of each)
    dedup: str = "holdout"
    # prepared rows, also gs:// or s3://; "": $MOR_JAX_CACHE or ~/.cache/mor_jax
    cache_dir: str = ""
    seed: int = 0  # of the global shuffle

    @property
    def key(self) -> str:
        """The field of a record that is read."""
        return self.text_key or ("messages" if self.format == "chat" else "text")

    @property
    def conversations(self) -> bool:
        """Whether records are conversations, whose tokens have loss weights."""
        return self.format != "text"


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, with clipping and a schedule."""

    algorithm: str = "adamw"  # adamw | muon (of the blocks' matrices; adamw of everything else)
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
    # Learning rate of the shared core over the model's; 0: 1 under adamw, under muon 1 / (times a
    # token runs the core)
    core_lr: float = 0.0
    # decay of a running mean of the weights, e.g. 0.999, which is evaluated and saved too; 0: none
    ema: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    steps: int = 0  # optimiser steps; 0: as many as `flops` pays for
    flops: float = 0.0  # training budget, FLOPs after the paper's accounting; used when steps is 0
    batch_size: int = 32  # global rows a step; divisible by accum and by data * fsdp
    accum: int = 1  # micro-batches a step
    # Length curriculum: (tokens, share of the steps) of each stage, shortest first. Rows are cut
    # into pieces of so many tokens, which do not see each other; after these stages they are whole
    lengths: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # of the initialisation
    log_every: int = 10  # steps
    # Beside metrics.jsonl: tensorboard | wandb | mlflow | "package.module:factory"
    # (train/trackers.py)
    trackers: tuple[str, ...] = ("tensorboard",)
    eval_every: int = 200  # steps; 0: at the end only
    eval_rows: int = 128  # held-out rows an evaluation reads; 0: all
    checkpoint_every: int = 200  # steps; 0: at the end only
    keep_checkpoints: int = 3
    # also the weights of the evaluation with the lowest causal loss, in best/
    keep_best: bool = False
    # evaluations in a row without a lower causal loss after which the run ends; 0: never
    patience: int = 0
    # Bad steps never change the weights (train/faults.py): skip | rewind to the last checkpoint,
    # and other rows | stop
    on_nonfinite: str = "stop"  # loss, gradient or update is not finite
    on_spike: str = "skip"
    # nats above the median of the last 64 steps that are a loss spike; 0: none is
    spike_threshold: float = 0.0

    def length_changes(self, steps: int) -> tuple[tuple[int, int], ...]:
        """(tokens, last step) of each stage of `lengths` in a run of so many steps."""
        ends, share = [], 0.0
        for length, part in self.lengths:
            share += part
            ends.append((length, round(share * steps)))
        return tuple(ends)

    def row_length(self, step: int, steps: int, context: int) -> int:
        """Tokens of the rows of optimiser step number `step` (from 1) of a run of `steps`."""
        return next((n for n, last in self.length_changes(steps) if step <= last), context)


@dataclass(frozen=True)
class AdapterConfig:
    """Fine-tuning by low-rank adapters (LoRA): the weights of --init_from stay, adapters of block
    matrices are trained."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float = 16.0  # adapters are scaled by alpha / rank
    # matrices of each block, those of the core once
    targets: tuple[str, ...] = ("qkv", "out", "gate_up", "down")


@dataclass(frozen=True)
class DistillConfig:
    """Training on what a teacher predicts: loss = (1 - weight) * next-token loss + weight *
    distillation loss."""

    # run directory or checkpoint of a model with the same tokenizer; used where weight is above 0
    teacher: str = ""
    weight: float = 0.0  # 0: off; 1: the teacher's predictions alone
    temperature: float = 1.0  # T of both softmaxes; the distillation loss is T^2 KL(teacher, model)


@dataclass(frozen=True)
class PreferenceConfig:
    """Direct preference optimisation (DPO) on data of `data.format` preference: the weights of
    --init_from are the reference."""

    beta: float = 0.1  # how strongly the model is held to the reference


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh and the logical-to-mesh rules. One axis may be -1: whatever is left."""

    data: int = -1  # copies of the weights, each with rows of its own; slices times something
    fsdp: int = 1  # rows here too, weights cut; divides width
    tensor: int = 1  # heads, mlp and vocabulary cut; divides kv_heads, mlp_width, vocab_size
    sequence: int = 1  # each row cut along time; divides context
    slices: int = 1  # parts of `data` that only the data centre's network (DCN) joins
    rules: tuple[tuple[str, str], ...] = ()  # overrides of `parallel.rules.DEFAULT_RULES`
