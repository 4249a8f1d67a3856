"""Looped Transformer (arXiv 2502.17416): the whole stack again and again, nothing else.

    python -m launch.train --config configs/family/looped.py --workdir runs/looped

Argument: r, the loops. Reproduced: k distinct blocks applied r times with one set of weights, loss
at the end. Expect, at equal FLOPs, a higher loss on text than unshared blocks and a lower one than
k blocks used once; the gain shows on tasks that need depth and not knowledge.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    r = arguments.parse(arg, r=4)["r"]
    return preset(f"looped-r{r}", (0, 2, 0), r)
