"""Every k-th token runs all recursions, the others one: a control for learned routing, nothing
learned or drawn.

    python -m launch.train --config configs/every_kth.py:360m,nr=3,every=2 --workdir runs/every-kth

Argument: the paper's size; nr, the recursions; every, k. At every=2 and three recursions a token
runs two recursions on average, as many as under expert-choice at its default capacities
(configs/mor.py). The paper has no such model.
"""

from ml_collections import ConfigDict

from configs import arguments, paper


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, size="360m", nr=3, every=2)
    config = paper.base("every-kth", args["size"], args["nr"])
    config.depth.update({"policy": "every_kth", "every": args["every"], "shallow": 1})
    return config
