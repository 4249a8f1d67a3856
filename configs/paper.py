"""The four model sizes of the Mixture-of-Recursions paper (arXiv 2507.10524, table 6) and its
recipe.

Llama-shaped: RMSNorm 1e-5, SwiGLU, RoPE, grouped queries, tied embeddings, no biases, vocabulary
49,152, 2,048 tokens. Unique non-embedding parameters: 106M / 315M / 654M / 1.61B unshared;
Middle-Cycle shares them down, e.g. 360m to 167M / 118M / 98M for two / three / four recursions.
"""

from ml_collections import ConfigDict

from configs.arguments import complete
from mor_jax.errors import ConfigError

# layers, width, heads, kv_heads, mlp_width
SIZES = {
    "135m": (30, 576, 9, 3, 1536),
    "360m": (32, 960, 15, 5, 2560),
    "730m": (26, 1536, 24, 8, 4096),
    "1.7b": (24, 2048, 32, 32, 8192),
}


def layers_for(size: str, recursions: int) -> int:
    """Unrolled layers: the paper adds layers where (L - 2) is not divisible by the recursions
    (135m: 32 for three)."""
    layers = SIZES[size][0]
    return layers + -(layers - 2) % recursions


def base(name: str, size: str, recursions: int) -> ConfigDict:
    """Model, data and training recipe at one size. Trapezoid schedule, 2.1M tokens a step (paper 3,
    released configs)."""
    if size not in SIZES:
        raise ConfigError(f"there is no size {size!r}; the paper's are {', '.join(SIZES)}.")
    if recursions < 1:
        raise ConfigError(f"nr = {recursions}: the number of recursions is at least 1.")
    _, width, heads, kv_heads, mlp_width = SIZES[size]
    return complete(
        {
            "name": f"{name}-{size}" + (f"-r{recursions}" if recursions > 1 else ""),
            "model": {
                "layers": layers_for(size, recursions),
                "recursions": recursions,
                "sharing": "middle_cycle" if recursions > 1 else "none",
                "width": width,
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": 0,  # width // heads = 64
                "mlp_width": mlp_width,
                "vocab_size": 49152,
                "context": 2048,
                "dtype": "bfloat16",
                "remat": "block",
                "attention": "auto",  # splash on TPUs, blocked elsewhere
                "loss_chunk": 256,
            },
            "depth": {"policy": "fixed"},
            "data": {
                # Runs anywhere as it is. For a real run point it at your corpus, e.g.
                # --config.data.source=files --config.data.paths="('/data/fineweb-edu/*.parquet',)"
                # --config.data.tokenizer=/data/smollm/tokenizer.json
                "source": "pystdlib",
                "paths": (),
                "name": "",
                "text_key": "",
                "tokenizer": "bpe",
                "bpe_vocab": 49152,
                "holdout": 0.02,
                "cache_dir": "",
                "seed": 0,
            },
            "optim": {
                "schedule": "wsd",
                "peak_lr": 3e-3,  # published for 360m
                "warmup": 0.006,  # 5 % of the smallest (2e18) budget's steps
                "decay": 0.2,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
            },
            "train": {
                "steps": 0,
                "flops": 16.5e18,  # forward FLOPs after the paper's accounting; sets the steps
                "batch_size": 1024,  # rows a step; divisible by accum * data * fsdp
                "accum": 16,
                "seed": 0,
                "log_every": 10,
                "eval_every": 1000,
                "eval_rows": 500,
                "checkpoint_every": 500,
                "keep_checkpoints": 3,
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )
