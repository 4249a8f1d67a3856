r"""A small Mixture-of-Recursions model that leads the runtime, trained on expert runs
(docs/native.md).

    rlm training make --tasks NEEDLES,verbatim HOW --samples 330 --seed 2 --out native/few.jsonl \
        --tokenizer native/tokenizer.json
    rlm training make --tasks NEEDLES,verbatim HOW --samples 6000 --seed 1 --out native/train.jsonl
    rlm training make --tasks NEEDLES HOW --samples 6000 --seed 5 --out native/more.jsonl
    rlm training drill --samples 12000 --seed 1 --out native/drill.jsonl
    python -m launch.train --config configs/native_rlm.py:stage=drill --workdir runs/drill
    python -m launch.train --config configs/native_rlm.py --workdir runs/first \
        --init_from runs/drill
    python -m launch.train --config configs/native_rlm.py:stage=more --workdir runs/native \
        --init_from runs/first

NEEDLES: s_niah,s_niah_essay,s_niah_uuid,niah_multikey,niah_needles,niah_uuids,niah_multivalue,
niah_multiquery,outside,injected (in one word). HOW: --strategies extract,recover,decline,slice
--readings 0 --copies 1.
Argument: tiny (default, 0.5M parameters) | small (2.4M); stage=drill: begin with exercises in
copying; stage=more: go on with other runs; stage=improve: a round of launch.improve; vanilla=1: the
plain Transformer of the same unrolled depth.
"""

from ml_collections import ConfigDict

from configs import arguments
from mor_jax.errors import ConfigError

# width, heads, kv_heads, mlp_width
SIZES = {"tiny": (96, 4, 4, 256), "small": (256, 4, 2, 704)}
# The longest conversation of the needle tasks has about 600 tokens, a drill 130.
STAGES = {
    "drill": {"steps": 800, "context": 144, "batch_size": 14, "peak_lr": 4e-3, "warmup": 0.1},
    "runs": {"steps": 3000, "context": 768, "batch_size": 4, "peak_lr": 3e-3, "warmup": 0.05},
    "more": {"steps": 2000, "context": 768, "batch_size": 4, "peak_lr": 2e-3, "warmup": 0.05},
    "improve": {"steps": 60, "context": 768, "batch_size": 4, "peak_lr": 1e-3, "warmup": 0.1},
}

FILES = {"drill": "drill", "more": "more"}  # under native/, of samples; else train


def get_config(arg: str = "") -> ConfigDict:
    chosen = arguments.parse(arg, size="tiny", stage="runs", vanilla=0)
    if chosen["size"] not in SIZES:
        raise ConfigError(f"native_rlm: {chosen['size']!r} is not one of {', '.join(SIZES)}.")
    if chosen["stage"] not in STAGES:
        raise ConfigError(f"native_rlm: {chosen['stage']!r} is not one of {', '.join(STAGES)}.")
    stage = STAGES[chosen["stage"]]
    width, heads, kv_heads, mlp_width = SIZES[chosen["size"]]
    depth = {"policy": "fixed"}
    if not chosen["vanilla"]:
        # 0.1 starves a small core
        depth = {"policy": "expert_choice", "capacities": (), "alpha": 1.0}
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
                "context": stage["context"],
                # 1 / sqrt(96): with 0.02 what all embeddings have in common, the logits of tokens
                # that never come, soon outweighs what tells them apart, and copying never begins.
                "init_std": 0.1,
                "smear": 6,  # previous embeddings mixed in, for copying
            },
            "depth": depth,
            "data": {
                "source": "files",
                "paths": (f"native/{FILES.get(chosen['stage'], 'train')}.jsonl",),
                "format": "chat",
                "chat_template": "chatml",
                "prompt_variant": "native",
                "tokenizer": "native/tokenizer.json",
                "holdout": 0.02,
            },
            "optim": {
                "schedule": "wsd",
                "peak_lr": stage["peak_lr"],
                "warmup": stage["warmup"],
                "decay": 0.2,
                "b2": 0.999,
            },
            "train": {
                "steps": stage["steps"],  # of 2,016 and 3,072 tokens
                "batch_size": stage["batch_size"],
                "eval_every": 150,
                "eval_rows": 32,
                "checkpoint_every": 150,
            },
        }
    )
