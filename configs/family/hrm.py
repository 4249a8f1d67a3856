"""HRM, a hierarchical reasoning model (arXiv 2506.21734): a slow and a fast network, each with a
state of its own.

    python -m launch.train --config configs/family/hrm.py --workdir runs/hrm

Argument: n, updates of the fast state z before each of the slow one y; t, rounds a segment; m,
segments. Reproduced: two networks, both states with what they read added, first states that are
drawn once, norms after the residuals, the one-step gradient (through the last update of each state
alone), deep supervision over segments whose states are detached. Not reproduced: the Q-head with
its targets, stablemax, AdamATan2; puzzles (see trm.py). TRM's ablation puts most of the distance to
it down to the one-step gradient.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.trm import segmented


def get_config(arg: str = "") -> ConfigDict:
    a = arguments.parse(arg, n=2, t=2, m=2)
    config = segmented(f"hrm-n{a['n']}-t{a['t']}-m{a['m']}", a["n"], a["t"], a["m"], 2, networks=2)
    config.optim.ema = 0.0
    return config
