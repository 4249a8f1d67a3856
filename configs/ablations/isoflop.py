"""Vanilla, recursive and Mixture-of-Recursions at three equal training budgets (paper, table 9; N_r
= 3).

    python -m launch.sweep configs/ablations/isoflop.py:small --workdir runs/isoflop

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. Budgets are forward FLOPs after the
paper's accounting. At small budgets every model is far from done and the cheaper token wins; the
paper's differences shrink as budgets grow.
"""

from configs import paper
from configs.ablations import sizes

BUDGETS = {"tiny": (1e9, 2e9, 4e9), "small": (5e11, 1.5e12, 5e12)}
PUBLISHED = (2e18, 5e18, 16.5e18)
# vanilla, recursive, MoR, each at the published budgets: validation NLL
PAPER = {
    "135m": ((3.0922, 2.9464, 2.8432), (3.2058, 3.0534, 2.9552), (3.1077, 3.0192, 2.9490)),
    "360m": ((3.3785, 3.0097, 2.7824), (3.4864, 3.0722, 2.8466), (3.1026, 2.9161, 2.7924)),
    "730m": ((3.7164, 3.0821, 2.7048), (3.8136, 3.1640, 2.7886), (3.3300, 3.0067, 2.7438)),
    "1.7b": ((5.1349, 3.6926, 2.8658), (5.3277, 3.8876, 3.0042), (4.1175, 3.2905, 2.8316)),
}


def get_sweep(arg: str = "") -> dict:
    size = sizes.parse(arg)
    scale = size if size in PAPER else "360m"
    base, budgets = sizes.base(size), BUDGETS.get(size, PUBLISHED)
    base.optim.update({"schedule": "wsd", "decay": 0.2, "final_lr": 0.0})
    base.train.steps = 0
    layers = sizes.fit(8, 3, ends=2) if size in sizes.OURS else paper.layers_for(size, 3)
    shared = {"model.sharing": "middle_cycle", "model.recursions": 3, "model.layers": layers}
    models = {
        "vanilla": {},
        "recursive": shared,
        "mor": {
            **shared,
            "depth.policy": "expert_choice",
            "depth.aux_loss_weight": 0.001 * sizes.RELEASED_ACCUMULATION,
        },
    }
    points = []
    for b, budget in enumerate(budgets):
        # As many warm-up steps at every budget as 5 % of the smallest one (released
        # configurations).
        of_budget = {"train.flops": budget, "optim.warmup": 0.05 * budgets[0] / budget}
        for m, (model, fields) in enumerate(models.items()):
            labels = {"model": model, "FLOPs": f"{budget:g}".replace("+", "")}
            points.append(
                {"labels": labels, "fields": fields | of_budget, "paper": PAPER[scale][m][b]}
            )
    published = ", ".join(f"{b:g}".replace("+", "") for b in PUBLISHED)
    return {
        "title": f"Equal training FLOPs, {size}",
        "base": base,
        "points": points,
        "x": "FLOPs",
        "columns": ("topk/nll", "tokens", "true_flops"),
        "paper": f"{scale}, {published} FLOPs, validation NLL, top-k, table 9",
    }
