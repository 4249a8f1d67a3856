"""A small Mixture-of-Recursions model that leads the runtime, trained on expert runs (docs/native.md).

    rlm training make --tasks all --samples 4000 --seed 1 --out native/train.jsonl
    python -m launch.train --config configs/native_rlm.py --workdir runs/native

Argument: tiny (default, 0.5M parameters) | small (3.3M); vanilla=1: the plain Transformer of the same unrolled depth.
"""

from ml_collections import ConfigDict

from configs import arguments
from mor_jax.errors import ConfigError

# width, heads, kv_heads, mlp_width, BPE pieces
SIZES = {"tiny": (96, 3, 1, 256, 2048), "small": (256, 4, 2, 704, 4096)}


def get_config(arg: str = "") -> ConfigDict:
    chosen = arguments.parse(arg, size="tiny", vanilla=0)
    if chosen["size"] not in SIZES:
        raise ConfigError(f"native_rlm: {chosen['size']!r} is not one of {', '.join(SIZES)}.")
    width, heads, kv_heads, mlp_width, pieces = SIZES[chosen["size"]]
    depth = {"policy": "fixed"}
    if not chosen["vanilla"]:
        depth = {"policy": "expert_choice", "capacities": (), "alpha": 1.0}  # 0.1 starves a small core
    return arguments.complete(
        {
            "name": f"native-{chosen['size']}" + ("-vanilla" if chosen["vanilla"] else ""),
            "model": {
                "layers": 5,  # unrolled: 1 + 1 x 3 + 1
                "recursions": 1 if chosen["vanilla"] else 3,
                "sharing": "none" if chosen["vanilla"] else "middle_cycle",
                "width": width,
                "heads": heads,
                "kv_heads": kv_heads,
                "mlp_width": mlp_width,
                "vocab_size": 0,  # the tokenizer's
                "context": 1024,  # tokens: the window of `rlm training make`
            },
            "depth": depth,
            "data": {
                "source": "files",
                "paths": ("native/train.jsonl",),
                "format": "chat",
                "chat_template": "chatml",
                "tokenizer": "bpe",
                "bpe_vocab": pieces,
                "holdout": 0.02,
            },
            "optim": {"schedule": "wsd", "peak_lr": 3e-3, "warmup": 0.05, "decay": 0.3},
            "train": {"steps": 3000, "batch_size": 4, "eval_every": 250, "checkpoint_every": 250},
        }
    )
