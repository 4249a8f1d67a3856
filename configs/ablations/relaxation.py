"""What a recursion has of its own: nothing, norms, an encoding, a low-rank addition (paper, table
16; N_r = 3).

    python -m launch.sweep configs/ablations/relaxation.py:small --workdir runs/relaxation

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. Trained from scratch it hardly matters
in the paper (whose unrelaxed row is that of shared keys); from pretrained weights see
`launch.convert --relaxation svd`.
"""

from configs.ablations import sizes

RANKS = {"tiny": 2, "small": 8}  # 64 at the paper's sizes

# label: fields, NLL of middle-cycle, three recursions; None: the paper has no such row
PAPER = {
    "none": ({}, 2.8854),
    "norms": ({"model.norms": "own"}, None),
    "encoding": ({"model.recursion_encoding": True}, 2.8604),
    "low rank": ({"model.lora_rank": 64}, 2.8599),
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
    points = []
    for name, (fields, nll) in PAPER.items():
        if "model.lora_rank" in fields:
            fields = {"model.lora_rank": RANKS.get(size, 64)}
        points.append({"labels": {"own": name}, "fields": fields, "paper": nll})
    return {
        "title": f"Relaxation, {size}",
        "base": base,
        "points": points,
        "columns": ("train_nll", "non_embedding", "true_flops"),
        "paper": "360m, N_r = 3, 10B tokens, training NLL, table 16",
    }
