"""Plain Transformer, the baseline of every comparison.

    python -m launch.train --config configs/vanilla.py:360m --workdir runs/vanilla

Argument: the paper's size, 135m | 360m | 730m | 1.7b. The paper's 360m reaches a validation NLL of
2.78 after 16.5e18 FLOPs (FineWeb-Edu, 9,438 steps, about 39 H100-hours at 40 % MFU).
"""

from ml_collections import ConfigDict

from configs import arguments, paper


def get_config(arg: str = "") -> ConfigDict:
    return paper.base("vanilla", arguments.parse(arg, size="360m")["size"], recursions=1)
