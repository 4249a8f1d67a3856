"""Expert-choice routers: loss weight, score function, alpha, architecture, z-loss (paper, table 13).

    python -m launch.sweep configs/ablations/routers.py:small --workdir runs/routers

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. The paper settles on a linear router, sigmoid, alpha 0.1 and
the smallest loss weight; an unbounded gate (`none`) diverged there. Read accuracy and dead tokens together.
"""

from configs.ablations import sizes

# nominal loss weight, score, alpha, router, z-loss: NLL
PAPER = {
    (0.01, "none", 1.0, "mlp", False): None,  # diverged
    (0.01, "sigmoid", 0.1, "mlp", False): 2.8967,
    (0.01, "sigmoid", 1.0, "mlp", False): 2.9189,
    (0.01, "tanh", 0.1, "mlp", False): 2.9426,
    (0.01, "tanh", 1.0, "mlp", False): 3.2743,
    (0.1, "sigmoid", 0.1, "mlp", False): 3.0416,
    (0.001, "sigmoid", 0.1, "mlp", False): 2.8816,
    (0.001, "tanh", 0.1, "mlp", False): 2.9933,
    (0.001, "sigmoid", 0.1, "linear", False): 2.8667,
    (0.001, "sigmoid", 0.1, "wide_mlp", False): 2.8716,
    (0.001, "sigmoid", 0.1, "linear", True): 2.8824,
}


def get_sweep(arg: str = "") -> dict:
    size = sizes.parse(arg)
    base = sizes.base(size)
    base.model.update(
        {"sharing": "middle_cycle", "recursions": 3, "layers": sizes.fit(sizes.layers_of(size), 3, ends=2)}
    )
    base.depth.policy = "expert_choice"
    points = []
    for (weight, score, alpha, router, z_loss), nll in PAPER.items():
        labels = {"loss": f"w{weight:g}", "score": score, "alpha": f"a{alpha:g}", "router": router}
        fields = {
            "depth.aux_loss_weight": weight * sizes.RELEASED_ACCUMULATION,
            "depth.score": score,
            "depth.alpha": alpha,
            "depth.router": router,
            "depth.z_loss_weight": 1e-3 if z_loss else 0.0,
        }
        points.append({"labels": labels | {"z-loss": "z" if z_loss else ""}, "fields": fields, "paper": nll})
    return {
        "title": f"Expert-choice routers, {size}",
        "base": base,
        "points": points,
        "columns": ("topk/nll", "sampling_accuracy", "dead_token_ratio", "causal/mean_depth"),
        "paper": "360m, N_r = 3, 10B tokens, training NLL, top-k, table 13",
    }
