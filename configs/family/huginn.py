"""Huginn, recurrent depth (arXiv 2502.05171): a random state, the input injected at each of a drawn
number of steps.

    python -m launch.train --config configs/family/huginn.py --workdir runs/huginn

Argument: r, the mean number of steps; k, the steps that have a gradient. Reproduced: prelude, core
and coda; a random first state; [state; input] through a matrix; sandwich norms; steps from a
log-normal Poisson distribution, one number a batch; the gradient through the last k; exit by the
change of the state (`config.recursion.exit`). Not reproduced: the initialisation by effective
depth, the embedding scale, the exit by the head's distribution through a coda. In the paper (3.5B
parameters, 800B tokens, r = 32) mathematics rises up to some 32 steps and factual recall stops at
8; at this size expect the loss to fall over the first few steps and to stay flat past the mean.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, r=4, k=4)
    recursion = {
        "state": "random",
        "injection": "concat",
        "sampling": "lognormal_poisson",
        "gradient_steps": args["k"],
    }
    return preset(
        f"huginn-r{args['r']}", (1, 2, 1), args["r"], {"norm_placement": "sandwich_out"}, recursion
    )
