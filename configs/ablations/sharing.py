"""Which layers to share: cycle, sequence and their middle forms, two and three recursions (paper,
table 10).

    python -m launch.sweep configs/ablations/sharing.py:small --workdir runs/sharing

Argument: tiny | small (default) | 135m | 360m | 730m | 1.7b. The paper finds middle-cycle best,
sequence worst. `full` is the unshared model, `reduced` an unshared one of as many layers as a
recursion core would have.
"""

from configs.ablations import sizes

# full, reduced (2, 3), then each scheme (2, 3): NLL on training text after 10B tokens
PAPER = {
    "360m": (
        2.8471,
        (2.8908, 2.9449),
        {
            "cycle": (2.8487, 2.9363),
            "sequence": (2.9467, 3.0245),
            "middle_cycle": (2.8295, 2.8760),
            "middle_sequence": (2.9303, 2.9753),
        },
    ),
    "135m": (
        3.0323,
        (3.0818, 3.1582),
        {
            "cycle": (3.0071, 3.1154),
            "sequence": (3.1093, 3.1637),
            "middle_cycle": (3.0330, 3.1048),
            "middle_sequence": (3.0991, 3.1602),
        },
    ),
}


def get_sweep(arg: str = "") -> dict:
    size = sizes.parse(arg)
    layers, scale = sizes.layers_of(size), size if size in PAPER else "360m"
    full, reduced, schemes = PAPER[scale]
    points = [{"labels": {"sharing": "full", "N_r": "1"}, "fields": {}, "paper": full}]
    for i, recursions in enumerate((2, 3)):
        labels = {"sharing": f"reduced to 1/{recursions}", "N_r": "1"}
        points.append(
            {
                "labels": labels,
                "fields": {"model.layers": layers // recursions},
                "paper": reduced[i],
            }
        )
        for scheme, found in schemes.items():
            ends = 2 if scheme.startswith("middle_") else 0
            fields = {
                "model.sharing": scheme,
                "model.recursions": recursions,
                "model.layers": sizes.fit(layers, recursions, ends),
            }
            points.append(
                {
                    "labels": {"sharing": scheme, "N_r": str(recursions)},
                    "fields": fields,
                    "paper": found[i],
                }
            )
    return {
        "title": f"Sharing schemes, {size}",
        "base": sizes.base(size),
        "points": points,
        "columns": ("train_nll", "non_embedding", "true_flops"),
        "paper": f"{scale}, 10B tokens, training NLL, table 10",
    }
