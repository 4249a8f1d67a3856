"""The shape of an 8B Llama: 32 layers of width 4096, as a Mixture-of-Recursions, a Recursive or a
plain Transformer.

    python -m launch.plan configs/llama8b.py --topology v5e-256 --suggest
    python -m launch.plan configs/llama8b.py:vanilla --topology v5e-256x4 --suggest

Argument: mor (default) | recursive | vanilla. With three recursions 12 of the 32 layers are unique:
3.1B parameters, of which the table has 0.5B; unshared 7.5B. A shape to plan with; nobody has
published a run of it.
"""

from ml_collections import ConfigDict

from configs import arguments
from mor_jax.errors import ConfigError


def get_config(arg: str = "") -> ConfigDict:
    kind = arguments.parse(arg, kind="mor")["kind"]
    if kind not in ("mor", "recursive", "vanilla"):
        raise ConfigError(f"llama8b: {kind!r} is not one of mor, recursive, vanilla.")
    recursions = 1 if kind == "vanilla" else 3
    return arguments.complete(
        {
            "name": f"{kind}-8b",
            "model": {
                "layers": 32,
                "recursions": recursions,
                "sharing": "none" if kind == "vanilla" else "middle_cycle",
                "width": 4096,
                "heads": 32,
                "kv_heads": 8,
                "mlp_width": 14336,
                "vocab_size": 128256,
                "context": 4096,
                "dtype": "bfloat16",
                "remat": "block",
                "attention": "auto",  # splash on TPUs, blocked elsewhere
                "loss_chunk": 512,
            },
            "depth": {"policy": "expert_choice", "aux_loss_weight": 0.016} if kind == "mor" else {},
            "data": {"source": "pystdlib", "tokenizer": "bpe", "bpe_vocab": 128256},
            "optim": {"schedule": "wsd", "peak_lr": 3e-4, "warmup": 0.01, "decay": 0.2},
            "train": {
                "steps": 100_000,
                "batch_size": 1024,
                "accum": 1,
                "log_every": 10,
                "eval_every": 1000,
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
        }
    )
