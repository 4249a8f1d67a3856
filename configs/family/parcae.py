"""Parcae (arXiv 2604.12946): Huginn with a state that cannot grow, and a number of steps for each
sequence.

    python -m launch.train --config configs/family/parcae.py --workdir runs/parcae

Argument: r, the mean number of steps; k, the steps that have a gradient. Reproduced: the diagonal
linear system that carries less than all of the state over a step; Poisson steps for each sequence;
the gradient through the last k; norms of queries and keys. Not reproduced: the norm after the
prelude. The paper has a loss below Huginn's recipe by 6 % in perplexity at 140M parameters, and
fewer spikes at high learning rates.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, r=4, k=4)
    recursion = {
        "state": "random",
        "injection": "diagonal",
        "sampling": "poisson",
        "sampling_scope": "sequence",
        "gradient_steps": args["k"],
    }
    return preset(f"parcae-r{args['r']}", (1, 2, 1), args["r"], {"qk_norm": True}, recursion)
