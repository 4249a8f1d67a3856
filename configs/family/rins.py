"""RINS (arXiv 2502.07503): loop the first half of the network, then run the second half once.

    python -m launch.train --config configs/family/rins.py --workdir runs/rins
    python -m launch.train --config configs/family/rins.py:stochastic --workdir runs/rins-stochastic

Argument: fixed (default) | stochastic; r, the rounds at most; skip, the chance in per cent that
stochastic leaves out each round after the first. Reproduced: the signature A^r B with equal halves,
and its stochastic form, which can be decoded at any number of rounds. Not reproduced: the linear
adapters of each round. The paper finds a better asymptote and exponent of the loss on text at equal
training FLOPs; at this size expect a small gain, or none.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset
from mor_jax.errors import ConfigError


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, kind="fixed", r=2, skip=50)
    if args["kind"] not in ("fixed", "stochastic"):
        raise ConfigError(f"rins: {args['kind']!r} is not one of fixed, stochastic.")
    recursion = (
        {"sampling": "binomial", "sampling_skip": args["skip"] / 100}
        if args["kind"] == "stochastic"
        else {}
    )
    return preset(f"rins-{args['kind']}-r{args['r']}", (0, 3, 3), args["r"], recursion=recursion)
