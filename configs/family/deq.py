"""Deep equilibrium model (arXiv 1909.01377): the state at which one more step changes nothing.

    python -m launch.train --config configs/family/deq.py --workdir runs/deq
    python -m launch.train --config configs/family/deq.py:attractor --workdir runs/attractor

Argument: implicit (default) | attractor | one_step; r, steps at most. Reproduced: training solves
for the fixed point of an injected block by Anderson's method, and its gradient is the implicit one,
solved likewise; `attractor` has the Neumann series up to order 1 in its place (arXiv 2605.12466),
`one_step` order 0. Norms after the residuals let the step contract. Inference runs r plain steps;
--exit latent --exit_threshold 0.001 stops each token at its fixed point. Not reproduced: Jacobian
penalties; Attractor's proposal backbone and its missing skip connection. mean_depth in the metrics
is the number of steps to the tolerance; if it stays at r, the step does not contract.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset
from mor_jax.errors import ConfigError

ADJOINTS = {
    "implicit": {"adjoint": "anderson", "adjoint_steps": 8},
    "attractor": {"adjoint": "neumann", "adjoint_steps": 1},
    "one_step": {"adjoint": "neumann", "adjoint_steps": 0},
}


def get_config(arg: str = "") -> ConfigDict:
    args = arguments.parse(arg, kind="implicit", r=12)
    if args["kind"] not in ADJOINTS:
        raise ConfigError(f"deq: {args['kind']!r} is not one of {', '.join(ADJOINTS)}.")
    recursion = {"injection": "add", "solver": "anderson", **ADJOINTS[args["kind"]]}
    config = preset(
        f"deq-{args['kind']}-r{args['r']}",
        (1, 2, 1),
        args["r"],
        {"norm_placement": "post"},
        recursion,
    )
    config.optim.peak_lr /= 3  # norms after the residuals, as in ut.py
    return config
