"""URM, a universal reasoning model (arXiv 2512.14693): one state, the input added at each loop, the
gradient through the last loops of a segment.

    python -m launch.train --config configs/family/urm.py --workdir runs/urm

Argument: r, loops a segment; k, those that have a gradient; m, segments. Reproduced: one stack
looped, a first state that is drawn once, norms after the residuals, truncated backpropagation
within detached segments that each have a loss, a running mean of the weights. Not reproduced: the
convolution in its SwiGLU, halting, puzzles (see trm.py). The paper puts its gain on ARC-AGI down to
the recurrence and that convolution, not to a hierarchy of states.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.trm import segmented


def get_config(arg: str = "") -> ConfigDict:
    a = arguments.parse(arg, r=4, k=3, m=2)
    return segmented(f"urm-r{a['r']}-k{a['k']}-m{a['m']}", 0, a["r"], a["m"], a["k"])
