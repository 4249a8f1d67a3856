"""The sizes that ablations come in: `tiny` runs in seconds, `small` in minutes on two cores, the
others are the paper's.

A sweep adds its own fields; `depth` and `sharing` are left plain here.
"""

import sysconfig

from ml_collections import ConfigDict

from configs import arguments, paper
from mor_jax.errors import ConfigError

OURS = ("tiny", "small")
TOKENS = 10e9  # of the paper's ablations (tables 8, 10, 13 to 15)
# The released trainer multiplies its router loss by its 16 accumulation steps; every loss here
# means the same under any accumulation, so that the paper's nominal coefficients are written out at
# what they amount to.
RELEASED_ACCUMULATION = 16


def parse(arg: str) -> str:
    """The size in a sweep's argument; `small` when there is none."""
    size = arguments.parse(arg, size="small")["size"]
    if size not in (*OURS, *paper.SIZES):
        raise ConfigError(
            f"there is no size {size!r}; choose one of {', '.join((*OURS, *paper.SIZES))}."
        )
    return size


def layers_of(size: str) -> int:
    """Layers of the unshared model."""
    return 8 if size in OURS else paper.SIZES[size][0]


def fit(layers: int, recursions: int, ends: int) -> int:
    """The most layers, not above `layers`, of which all but `ends` split into `recursions` (as the
    paper's ablations)."""
    return ends + (layers - ends) // recursions * recursions


def base(size: str) -> ConfigDict:
    """An unshared model of this size and the ablations' recipe: cosine to a tenth, the same tokens
    for every run."""
    if size not in OURS:
        config = paper.base("ablation", size, 1)
        config.optim.update({"schedule": "cosine", "warmup": 0.05, "final_lr": 0.1})
        config.train.update(
            {
                "flops": 0.0,
                "steps": round(TOKENS / (config.train.batch_size * config.model.context)),
            }
        )
        return config
    tiny = size == "tiny"
    return arguments.complete(
        {
            "name": "ablation",
            "model": {
                "layers": layers_of(size),
                "width": 32 if tiny else 128,
                "heads": 2 if tiny else 4,
                "kv_heads": 1 if tiny else 2,
                "mlp_width": 64 if tiny else 352,
                "context": 64 if tiny else 256,
                "loss_chunk": 0 if tiny else 128,
            },
            "data": {
                # tiny: two hundred kilobytes of text that every Python has.
                "source": "files" if tiny else "pystdlib",
                "paths": (
                    sysconfig.get_path("stdlib") + "/json/*.py",
                    sysconfig.get_path("stdlib") + "/email/*.py",
                )
                if tiny
                else (),
                "tokenizer": "bytes" if tiny else "bpe",
                "bpe_vocab": 2048,
                "holdout": 0.1,
            },
            "optim": {"schedule": "cosine", "peak_lr": 5e-3, "warmup": 0.05, "final_lr": 0.1},
            "train": {
                "steps": 30 if tiny else 1200,
                "batch_size": 8,
                "log_every": 5 if tiny else 20,
                "eval_every": 0,
                "eval_rows": 16 if tiny else 128,
                "checkpoint_every": 0 if tiny else 300,
                "keep_checkpoints": 1,
            },
        }
    )
