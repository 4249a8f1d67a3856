"""A recursive model made of an unshared or recursive one, and trained on; optionally taught by its
source.

    python -m launch.convert --checkpoint runs/vanilla \\
        --config configs/uptrain.py:mor,source=runs/vanilla --workdir runs/up
    python -m launch.train --config configs/uptrain.py:mor,source=runs/vanilla --workdir runs/up
    python -m launch.train --config configs/uptrain.py:mor,source=runs/vanilla \\
        --workdir runs/taught --init_from runs/up \\
        --config.distill.weight=0.5

Arguments: mor (default) | recursive; nr, the recursions; ends, the blocks that an unshared source
keeps on either side of the core (1; more of them start nearer to the source); source, its run
directory, whose shape, tokenizer and text the configuration takes. Other text:
--config.data.source=files --config.data.paths="('more/*.jsonl.gz',)".
With config.distill.weight above 0 the source is also the teacher (docs/guide.md).
"""

from ml_collections import ConfigDict

from configs import arguments
from mor_jax.errors import ConfigError


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, kind="mor", nr=2, ends=1, source="")
    kind, recursions, source = args["kind"], args["nr"], args["source"]
    if kind not in ("mor", "recursive"):
        raise ConfigError(f"uptrain: {kind!r} is not one of mor, recursive.")
    if not source:
        raise ConfigError(
            "uptrain: give the run directory of the source, e.g. configs/uptrain.py:mor,source=runs/vanilla."
        )
    old, unshared, core = arguments.source(source)
    model = old["model"] | {"recursions": recursions}
    if old["model"]["recursions"] > 1:  # its core, applied nr times
        model["layers"] = unshared + core * recursions
    else:
        model |= {"sharing": "middle_cycle", "prelude": args["ends"], "coda": args["ends"]}
    mor = {
        "policy": "expert_choice",
        "alpha": 1.0,
        "aux_loss_weight": 0.016,
        "executor": "gathered",
    }
    return arguments.complete(
        {
            "name": f"{old['name']}-{kind}{recursions}",
            "model": model,
            "depth": mor if kind == "mor" else {"policy": "fixed"},
            "data": old["data"] | {"tokenizer": f"{source.rstrip('/')}/tokenizer.json"},
            # The weights are trained already: a tenth of a rate for fresh ones.
            "optim": {"peak_lr": 3e-4, "warmup": 0.05, "decay": 0.3},
            "train": {
                "steps": 1000,
                "batch_size": 8,
                "eval_every": 100,
                "checkpoint_every": 200,
                "keep_checkpoints": 2,
            },
            "distill": {"teacher": source},
        }
    )
