"""Universal Transformer with adaptive computation time (arXiv 1807.03819, 1603.08983): each token
halts by itself.

    python -m launch.train --config configs/family/ut_act.py --workdir runs/ut-act

Argument: r, the steps at most; tau, the weight of the ponder cost in thousandths. Reproduced: one
shared block with the sinusoidal signal of the step, norms after the residuals, per-token ACT with
its remainder, the ponder cost, the mean of the states as output, the halting bias of 1. A token
that halted stays visible by its newest keys (the paper projects its frozen state anew). Not
reproduced: position signals at every step (rotary embedding does that). Expect a mean depth
(mean_depth in the metrics) that falls with tau; a large tau stops all tokens after one step. On
text of this size expect no gain over `ut.py` but the saved steps.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, r=6, tau=10)
    config = preset(
        f"ut-act-r{args['r']}",
        (0, 1, 0),
        args["r"],
        {"norm_placement": "post"},
        {"conditioning": "sinusoid"},
    )
    config.depth.update({"policy": "act", "ponder_weight": args["tau"] / 1000})
    config.optim.peak_lr /= 3  # norms after the residuals, as in ut.py
    return config
