"""One, two or three recursions over the same unique parameters: 1 + b + 1 blocks (paper, table 8;
expert-choice).

    python -m launch.sweep configs/ablations/recursions.py:small --workdir runs/recursions

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. More recursions cost more FLOPs a
token and no parameters.
"""

from configs.ablations import sizes

PAPER = {1: 2.9678, 2: 2.9205, 3: 2.9111}  # 118M unique parameters


def get_sweep(arg: str = "") -> dict:
    size = sizes.parse(arg)
    core = (sizes.layers_of(size) - 2) // 3
    points = [{"labels": {"N_r": "1"}, "fields": {"model.layers": 2 + core}, "paper": PAPER[1]}]
    for recursions in (2, 3):
        fields = {
            "model.layers": 2 + core * recursions,
            "model.recursions": recursions,
            "model.sharing": "middle_cycle",
            "depth.policy": "expert_choice",
            "depth.aux_loss_weight": 0.001 * sizes.RELEASED_ACCUMULATION,
        }
        points.append(
            {"labels": {"N_r": str(recursions)}, "fields": fields, "paper": PAPER[recursions]}
        )
    return {
        "title": f"Recursions at fixed unique parameters, {size}",
        "base": sizes.base(size),
        "points": points,
        "columns": ("topk/nll", "causal/mean_depth", "non_embedding", "true_flops"),
        "paper": "118M unique, 10B tokens, validation NLL, top-k, table 8",
    }
