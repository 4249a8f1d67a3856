"""Token-choice balancing: a loss, or a moved selection bias; score, alpha, router, z-loss (paper,
table 14).

    python -m launch.sweep configs/ablations/balancing.py:small --workdir runs/balancing

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. MaxVio is the largest load over the
mean, less one; entropy is of the mean scores, at most ln 3 = 1.099. The paper settles on the loss
at 0.1 with a linear router and softmax.
"""

from configs.ablations import sizes

# kind, weight of the loss or rate of the bias, score, alpha, router, z-loss: NLL
PAPER = {
    ("loss", 0.1, "softmax", 1.0, "mlp", True): 3.0239,
    ("loss", 0.01, "softmax", 1.0, "mlp", True): 2.9118,
    ("free", 0.01, "softmax", 1.0, "mlp", True): 2.9078,
    ("free", 0.01, "sigmoid", 0.1, "mlp", True): 3.1144,
    ("free", 0.01, "sigmoid", 1.0, "mlp", True): 3.0188,
    ("free", 0.001, "softmax", 1.0, "mlp", True): 2.9081,
    ("free", 0.001, "sigmoid", 0.1, "mlp", True): 2.9165,
    ("free", 0.001, "sigmoid", 1.0, "mlp", True): 3.0188,
    ("loss", 0.1, "softmax", 1.0, "linear", True): 2.9974,
    ("loss", 0.1, "softmax", 1.0, "wide_mlp", True): 3.0293,
    ("loss", 0.1, "softmax", 1.0, "linear", False): 2.9358,
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
    base.depth.policy = "token_choice"
    points = []
    for (kind, strength, score, alpha, router, z_loss), nll in PAPER.items():
        labels = {
            "balancing": f"{kind} {strength:g}",
            "score": score,
            "alpha": f"a{alpha:g}",
            "router": router,
        }
        fields = {
            "depth.balance_loss_weight": strength if kind == "loss" else 0.0,
            "depth.bias_rate": strength if kind == "free" else 0.0,
            "depth.score": score,
            "depth.alpha": alpha,
            "depth.router": router,
            # of the paper's text; its released configuration says 1e-5
            "depth.z_loss_weight": 1e-3 if z_loss else 0.0,
        }
        points.append(
            {"labels": labels | {"z-loss": "z" if z_loss else ""}, "fields": fields, "paper": nll}
        )
    return {
        "title": f"Token-choice balancing, {size}",
        "base": base,
        "points": points,
        "columns": ("router/max_vio", "router/entropy", "causal/mean_depth"),
        "paper": "360m, N_r = 3, 10B tokens, training NLL, table 14",
    }
