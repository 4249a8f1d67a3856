"""PonderNet (arXiv 2107.05407): a learned chance to stop at each step, held to a geometric prior.

    python -m launch.train --config configs/family/pondernet.py --workdir runs/pondernet

Argument: r, the steps at most; rate, the prior's chance to stop in per cent. Reproduced: the
expected loss over the steps and the divergence from a truncated geometric distribution, weight
0.01. Inference runs all steps, unless --config.recursion.exit=draw
--config.recursion.exit_threshold=1 draws the halt from the gate as in the paper, or exit=cdf with
exit_threshold=0.5 stops at the median of it. Expect the expected exit
(recursion/exit_step in the metrics) near 100 / rate steps on easy text.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, r=6, rate=30)
    recursion = {
        "injection": "add",
        "loss": "gate",
        "gate_prior": "geometric",
        "gate_rate": args["rate"] / 100,
        "gate_weight": 0.01,
    }
    return preset(f"pondernet-r{args['r']}", (0, 1, 0), args["r"], recursion=recursion)
