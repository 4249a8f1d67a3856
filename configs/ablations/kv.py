"""Whose keys and values a recursion sees: its own, the first recursion's, or a mixture (paper,
table 15; N_r = 3).

    python -m launch.sweep configs/ablations/kv.py:small --workdir runs/kv

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. In the paper sharing costs a recursive
model and expert-choice about 0.01 to 0.02 nats, helps token-choice as much, and the hybrid (of the
released code, here hybrid_first) equals recursion-wise caching.
"""

from configs.ablations import sizes

# policy, strategy: NLL of middle-cycle, three recursions
PAPER = {
    ("fixed", "full"): 2.8760,
    ("fixed", "shared"): 2.8854,
    ("expert_choice", "recursion_wise"): 2.8667,
    ("expert_choice", "shared"): 2.8895,
    ("expert_choice", "hybrid_first"): 2.8653,
    ("token_choice", "recursion_wise"): 2.9358,
    ("token_choice", "shared"): 2.9155,
}


def get_sweep(arg: str = "") -> dict:
    size = sizes.parse(arg)
    base = sizes.base(size)
    base.model.update(
        {
            "sharing": "middle_cycle",
            "recursions": 3,
            "layers": sizes.fit(sizes.layers_of(size), 3, ends=2),
        }
    )
    router = {"expert_choice": {"depth.aux_loss_weight": 0.001 * sizes.RELEASED_ACCUMULATION}}
    points = [
        {
            "labels": {"policy": policy, "kv": kv},
            "fields": {"depth.policy": policy, "depth.kv": kv, **router.get(policy, {})},
            "paper": nll,
        }
        for (policy, kv), nll in PAPER.items()
    ]
    return {
        "title": f"KV strategies, {size}",
        "base": base,
        "points": points,
        "columns": ("topk/nll", "train_nll", "causal/mean_depth", "true_flops"),
        "paper": "360m, N_r = 3, 10B tokens, training NLL, top-k, table 15",
    }
