"""A Mixture-of-Recursions model of this computer's own Python library, in minutes on two cores.

    python -m launch.train --config configs/quickstart.py --workdir runs/mor
    python -m launch.train --config configs/quickstart.py:vanilla --workdir runs/vanilla

Argument: mor (default) | vanilla | recursive: the same text, batch and training FLOPs for each.
"""

from ml_collections import ConfigDict

from configs import arguments
from mor_jax.errors import ConfigError

RECURSIONS = 3


def get_config(arg: str = "") -> ConfigDict:
    kind = arguments.parse(arg, kind="mor")["kind"]
    if kind not in ("mor", "vanilla", "recursive"):
        raise ConfigError(f"quickstart: {kind!r} is not one of mor, vanilla, recursive.")
    recursions = 1 if kind == "vanilla" else RECURSIONS
    depth = {"policy": "fixed"}
    if kind == "mor":
        depth = {
            "policy": "expert_choice",
            "capacities": (),
            "alpha": 0.1,
            "aux_loss_weight": 0.02,
            "executor": "gathered",
        }
    return arguments.complete(
        {
            "name": kind,
            "model": {
                "layers": 8,  # unrolled: 1 + 2 x 3 + 1
                "recursions": recursions,
                "sharing": "none" if kind == "vanilla" else "middle_cycle",
                "width": 192,
                "heads": 3,
                "kv_heads": 1,
                "mlp_width": 512,
                "vocab_size": 0,  # the tokenizer's
                "context": 256,
                "dtype": "float32",
                "attention": "blocked",
                "loss_chunk": 128,
            },
            "depth": depth,
            "data": {
                "source": "pystdlib",
                "paths": (),
                "text_key": "",
                "tokenizer": "bpe",
                "bpe_vocab": 2048,
                "holdout": 0.1,
                "cache_dir": "",
                "seed": 0,
            },
            "optim": {"schedule": "wsd", "peak_lr": 5e-3, "warmup": 0.05, "decay": 0.3},
            "train": {
                "steps": 0,
                # forward FLOPs after the paper's accounting, the same for every kind
                "flops": 5e12,
                "batch_size": 4,
                "accum": 1,
                "seed": 0,
                "log_every": 10,
                "eval_every": 200,
                "eval_rows": 128,
                "checkpoint_every": 200,
                "keep_checkpoints": 2,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
