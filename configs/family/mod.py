"""Mixture-of-Depths (arXiv 2404.02258): a plain stack whose every second layer takes an eighth of
the tokens.

    python -m launch.train --config configs/family/mod.py --workdir runs/mod

Argument: pairs of an ordinary and a routed layer; share, of the tokens in a routed layer, per cent.
Reproduced: top-k of the row in each routed layer by a router of its own, tokens that come back,
nothing shared, the router's weight on what the block adds, a binary loss that lets decoding go by
each token's own score. Not reproduced: the router's weight is a sigmoid here. The paper has a lower
loss than a plain Transformer at equal training FLOPs, since a step is cheaper; the top-k loss of
training sees the future, compare by the causal one.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, pairs=4, share=12)
    layers = 2 * args["pairs"]
    config = preset(f"mod-{layers}", (0, 1, 0), layers, {"networks": layers})
    config.depth.update(
        {
            "policy": "mod",
            "capacities": (1.0, args["share"] / 100) * args["pairs"],
            "alpha": 1.0,
            "aux_loss_weight": 0.02,
        }
    )
    return config
