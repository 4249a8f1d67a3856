"""Learned against random routing: the same capacities, with a router or drawn (paper, table 13; N_r
= 3).

    python -m launch.sweep configs/ablations/random_routing.py:small --workdir runs/random

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. In the paper the router is worth 0.067
nats over a draw, and the two fixed ends of the scale stand beside them: no routing at all, and a
draw whose gate is 1 instead of alpha.
"""

from configs.ablations import sizes

# policy, gate: NLL of middle-cycle, three recursions; None: the paper has no such row
PAPER = {
    ("expert_choice", "multiplicative"): 2.8667,
    ("random", "constant"): 2.9335,
    ("random", "additive"): None,
    ("fixed", ""): 2.8760,
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
            "labels": {"routing": policy, "gate": gate},
            "fields": {"depth.policy": policy, "depth.gate": gate, **router.get(policy, {})},
            "paper": nll,
        }
        for (policy, gate), nll in PAPER.items()
    ]
    return {
        "title": f"Learned and random routing, {size}",
        "base": base,
        "points": points,
        "columns": ("topk/nll", "dead_token_ratio", "causal/mean_depth", "true_flops"),
        "paper": "360m, N_r = 3, 10B tokens, training NLL, top-k, tables 13 and 15",
    }
