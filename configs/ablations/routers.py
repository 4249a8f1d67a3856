"""Expert-choice routers: auxiliary router or loss, score function, alpha, architecture, warm-up,
z-loss (paper, table 13).

    python -m launch.sweep configs/ablations/routers.py:small --workdir runs/routers

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. The paper settles on a linear router,
sigmoid, alpha 0.1 and the smallest loss weight; an unbounded gate (`none`) diverged there. Read
accuracy and dead tokens together.
"""

from configs.ablations import sizes

# With an auxiliary router, which alone decides at inference: score, alpha: NLL. The router is an
# MLP.
AUXILIARY = {
    ("none", 1.0): None,  # diverged
    ("sigmoid", 0.1): 2.8893,
    ("sigmoid", 1.0): 2.8867,
    ("tanh", 0.1): 2.8720,
    ("tanh", 1.0): 3.0624,
}
# of the chosen router, its capacities falling from 1; the paper does not say over how many steps
WARM_UP = 2.8744
WARM_SHARE = 0.1  # of our run
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
        {
            "sharing": "middle_cycle",
            "recursions": 3,
            "layers": sizes.fit(sizes.layers_of(size), 3, ends=2),
        }
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
        points.append(
            {"labels": labels | {"more": "z" if z_loss else ""}, "fields": fields, "paper": nll}
        )
    # The auxiliary router is another's gradient away from the model: its loss has no weight to
    # choose.
    auxiliary = {
        "depth.inference": "auxiliary",
        "depth.aux_loss_weight": 1.0,
        "depth.router": "mlp",
    }
    for (score, alpha), nll in AUXILIARY.items():
        labels = {
            "loss": "auxiliary",
            "score": score,
            "alpha": f"a{alpha:g}",
            "router": "mlp",
            "more": "",
        }
        fields = auxiliary | {
            "depth.score": score,
            "depth.alpha": alpha,
            "depth.z_loss_weight": 0.0,
        }
        points.append({"labels": labels, "fields": fields, "paper": nll})
    chosen = next(point for point in points if point["paper"] == 2.8667)
    points.append(
        {
            "labels": chosen["labels"] | {"more": "warm-up"},
            "fields": chosen["fields"] | {"depth.warmup": round(WARM_SHARE * base.train.steps)},
            "paper": WARM_UP,
        }
    )
    return {
        "title": f"Expert-choice routers, {size}",
        "base": base,
        "points": points,
        "columns": ("topk/nll", "sampling_accuracy", "dead_token_ratio", "causal/mean_depth"),
        "paper": "360m, N_r = 3, 10B tokens, training NLL, top-k, table 13",
    }
