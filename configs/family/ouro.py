"""Ouro, LoopLM, stage I (arXiv 2510.25741): a loss after every loop, weighed by a learned exit gate
with an entropy bonus.

    python -m launch.train --config configs/family/ouro.py --workdir runs/ouro

Argument: r, the loops. Reproduced: the whole stack looped, sandwich norms inside the branches, a
norm of the state after each loop, the gate's expected loss with weight 0.05 on the divergence from
uniform, exit once the gate has stopped with a chance q (--config.recursion.exit=cdf
--config.recursion.exit_threshold=0.8). Not reproduced: stage II, and sharing the norm after a loop
with the head's. The metrics hold the loss after each loop and the expected exit. At scale the paper
has 1.4B parameters on par with 4B on reasoning, best at the trained number of loops, slowly worse
past it.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    r = arguments.parse(arg, r=4)["r"]
    recursion = {"loss": "gate", "gate_prior": "uniform", "gate_weight": 0.05, "loop_norm": True}
    return preset(f"ouro-r{r}", (0, 2, 0), r, {"norm_placement": "sandwich_in"}, recursion)
