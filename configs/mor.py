"""Mixture-of-Recursions, expert-choice, Middle-Cycle: the paper's main model.

    python -m launch.train --config configs/mor.py:360m,nr=3 --workdir runs/mor

Argument: the paper's size, and nr, the recursions. The paper's 360m reaches a validation NLL (top-k) of 2.75 / 2.79 /
2.82 with two / three / four recursions after 16.5e18 FLOPs; this code also reports the causal one.
"""

from ml_collections import ConfigDict

from configs import arguments, paper


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, size="360m", nr=3)
    config = paper.base("mor", args["size"], args["nr"])
    config.depth.update(
        {
            "policy": "expert_choice",
            "capacities": (),  # (R - r + 1) / R
            "alpha": 0.1,
            # Nominal 0.001 in the released trainer, which scales it by its 16 accumulation steps; here every loss
            # term means the same under any accumulation, so its effective weight is written out.
            "aux_loss_weight": 0.016,
            "threshold": 0.5,
            "executor": "gathered",
        }
    )
    return config
