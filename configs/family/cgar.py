"""CGAR (arXiv 2511.08653): TRM whose early segments weigh more.

    python -m launch.train --config configs/family/cgar.py --workdir runs/cgar

Argument: as trm.py. Reproduced here: the weight 0.7^(s - 1) of segment s. The other half of the
paper, a depth (n, t) that grows over training in stages (2, 1), (4, 2), (6, 3), is a value of
`python -m benchmarks.sudoku`, which trains the same weights at one depth after the other; in
launch.train the depth is fixed. The paper has TRM's accuracy on Sudoku-Extreme within 0.6 points at
1.7 times its speed.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.trm import segmented


def get_config(arg: str = "") -> ConfigDict:
    a = arguments.parse(arg, n=2, t=2, m=2)
    name = f"cgar-n{a['n']}-t{a['t']}-m{a['m']}"
    return segmented(name, a["n"], a["t"], a["m"], a["n"] + 1, loss="decay", loss_decay=0.7)
