"""The models that `benchmarks/quality.py` compares, and the paper's orderings of them.

One recipe for all: 8 unrolled layers of width 128 (9 where a scheme has no layers of its own at the
ends: the nearest count that three recursions divide), rows of 256 tokens, BPE of 2048, AdamW with a
linear warm-up and cool-down. The peak learning rate was chosen on vanilla, of two tried: at 5e-3 it
ended 0.35 nats higher than at 2e-3, the expert-choice model 0.27 and the recursive one 0.14. So
part of any difference here may be one of learning rates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from configs import arguments
from mor_jax.analysis import accounting
from mor_jax.analysis.contrast import Contrast
from mor_jax.analysis.sweep import Sweep
from mor_jax.config import from_config_dict

# true training FLOPs of a run: about 100 seconds of two quiet cores, compilation and evaluation
# included
FLOPS = 8e12
RECURSIONS = 3
# Nominal 0.001, at what it amounts to in the released trainer, which does not divide it by its 16
# accumulation steps.
ROUTER_LOSS = 0.016

_SHARED = {"model.recursions": RECURSIONS, "model.sharing": "middle_cycle"}
_EXPERT = {**_SHARED, "depth.policy": "expert_choice", "depth.aux_loss_weight": ROUTER_LOSS}
_VARIED = {**_EXPERT, "depth.vary": 0.5}
# Made for the dial, small and over bytes so that a budget of minutes is long training. Nearly every
# token runs every recursion in most steps, so that the deepest is as well trained as the first; all
# recursions see the keys of the first, so that the few tokens that a low setting sends deeper find
# the same context there as all would.
_FOR_THE_DIAL = {
    **_EXPERT,
    "model.recursions": 2,
    "model.width": 64,
    "model.mlp_width": 176,
    "model.loss_chunk": 0,
    "model.vocab_size": 320,
    "data.tokenizer": "bytes",
    "depth.alpha": 1.0,
    "depth.capacities": (1.0, 0.98),
    "depth.kv": "shared",
    "depth.vary": 0.25,
    "depth.vary_depths": 3,
    "train.batch_size": 16,
    "optim.peak_lr": 4e-3,
}
_TOKEN = {
    **_SHARED,
    "depth.policy": "token_choice",
    "depth.balance_loss_weight": 0.1,
    "depth.z_loss_weight": 1e-5,
}
_NINE = {"model.recursions": RECURSIONS, "model.layers": 9}

MODELS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "recursive": _SHARED,  # is middle-cycle of the sharing schemes
    "MoR expert": _EXPERT,
    "MoR token": _TOKEN,
    "cycle": {**_NINE, "model.sharing": "cycle"},
    "sequence": {**_NINE, "model.sharing": "sequence"},
    "middle-sequence": {**_SHARED, "model.sharing": "middle_sequence"},
    "MoR random": {**_SHARED, "depth.policy": "random"},
}
# Of benchmarks/dial.py: two of those above, one of them trained at varied depths half of its steps,
# and one made for it.
VARIED, MADE_FOR_IT = "MoR expert varied", "MoR for the dial"
DIALLED = ("MoR expert", VARIED, "MoR token", MADE_FOR_IT)
LAST = ("MoR random",)  # trained when all others are: the control of one of them

# Of the 360M model with three recursions. The architectures are compared at a budget (table 9,
# validation), the sharing schemes and routings after 10B tokens (tables 10 and 13, training). At
# its smallest budget the paper has MoR below vanilla, at its largest above: our runs are far below
# either, so the smallest is the one to hold them against.
_SMALLEST, _LARGEST = "2e18 FLOPs, table 9", "16.5e18 FLOPs, table 3"
_SHARING = "10B tokens, table 10"
CONTRASTS = (
    Contrast("vanilla", "recursive", 3.4864 - 3.3785, _SMALLEST),
    Contrast("MoR_expert", "recursive", 3.4864 - 3.1026, _SMALLEST),
    Contrast(
        "MoR_expert", "vanilla", 3.3785 - 3.1026, f"{_SMALLEST}; at 16.5e18 the other way, by 0.010"
    ),
    Contrast("MoR_expert", "MoR_token", 2.9163 - 2.7925, _LARGEST),
    Contrast("vanilla", "MoR_token", 2.9163 - 2.7824, _LARGEST),
    Contrast("recursive", "cycle", 2.9363 - 2.8760, _SHARING),
    Contrast("recursive", "middle-sequence", 2.9753 - 2.8760, _SHARING),
    Contrast("recursive", "sequence", 3.0245 - 2.8760, _SHARING),
    Contrast("cycle", "middle-sequence", 2.9753 - 2.9363, _SHARING),
    Contrast("cycle", "sequence", 3.0245 - 2.9363, _SHARING),
    Contrast("middle-sequence", "sequence", 3.0245 - 2.9753, _SHARING),
    Contrast("MoR_expert", "MoR_random", 2.9335 - 2.8667, "10B tokens, table 13"),
)


def base(corpus: str) -> dict[str, Any]:
    """The recipe; every model changes only its own fields."""
    config = arguments.complete(
        {
            "name": "quality",
            "model": {
                "layers": 8,
                "width": 128,
                "heads": 4,
                "kv_heads": 2,
                "mlp_width": 352,
                "vocab_size": 2048,
                "context": 256,
                "loss_chunk": 128,
            },
            "data": {
                "source": "files",
                "paths": (corpus,),
                "tokenizer": "bpe",
                "bpe_vocab": 2048,
                "holdout": 0.1,
            },
            "optim": {"schedule": "wsd", "peak_lr": 2e-3, "warmup": 0.05, "decay": 0.3},
            "train": {
                "batch_size": 4,
                "log_every": 20,
                "eval_every": 0,
                "eval_rows": 256,
                "checkpoint_every": 0,
                "keep_checkpoints": 1,
            },
        }
    )
    return config.to_dict()


def steps_for(recipe: dict[str, Any], fields: dict[str, Any], flops: float) -> int:
    """Optimiser steps that spend these true FLOPs, to the nearest step."""
    tree = {
        group: dict(value) if isinstance(value, dict) else value for group, value in recipe.items()
    }
    tree["train"]["steps"] = 1
    for key, value in fields.items():
        group, name = key.split(".")
        tree[group][name] = value
    return max(1, round(flops / accounting.true_training_flops(from_config_dict(tree), 1)))


def sweep(corpus: str, flops: float = FLOPS, names: tuple[str, ...] = tuple(MODELS)) -> Sweep:
    """These models as a sweep, each with the steps that the budget pays for."""
    recipe, known = base(corpus), MODELS | {VARIED: _VARIED, MADE_FOR_IT: _FOR_THE_DIAL}
    points = [
        {
            "labels": {"model": name},
            "fields": {**fields, "train.steps": steps_for(recipe, fields, flops)},
        }
        for name, fields in ((name, known[name]) for name in names)
    ]
    return Sweep.from_dict(
        {
            "title": "Quality at equal training FLOPs",
            "base": recipe,
            "points": points,
            "columns": (
                "causal/bits_per_byte",
                "topk/nll",
                "causal/mean_depth",
                "sampling_accuracy",
                "dead_token_ratio",
                "non_embedding",
                "steps",
                "tokens",
                "true_flops",
            ),
        }
    )


def groups(whole: Sweep) -> list[Sweep]:
    """What is trained first, then what is trained last."""
    split = [
        [p for p in whole.points if (p.labels["model"] in LAST) == last] for last in (False, True)
    ]
    return [dataclasses.replace(whole, points=tuple(points)) for points in split if points]
