"""TRM, a tiny recursive model (arXiv 2510.04871): one network, an answer y and a latent z, and a
loss after each of several detached segments.

    python -m launch.train --config configs/family/trm.py --workdir runs/trm

Argument: n, updates of z before each of y; t, rounds a segment; m, segments. Reproduced: the shared
network, z <- F(z + y + x) n times and y <- F(y + z), first states that are drawn once, norms after
the residuals, the gradient through the last round of a segment alone, deep supervision over
segments whose states are detached, a running mean of the weights. Not reproduced here: the paper
solves puzzles, with one optimiser step a segment and a learned halt; that is
`mor_jax/train/segments.py`, run by `python -m benchmarks.sudoku`. As a causal model of text, as
here, all segments are in one optimiser step; expect a loss above `recursive` at equal FLOPs.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    a = arguments.parse(arg, n=2, t=2, m=2)
    return segmented(f"trm-n{a['n']}-t{a['t']}-m{a['m']}", a["n"], a["t"], a["m"], a["n"] + 1)


def segmented(
    name: str, n: int, t: int, m: int, window: int, networks: int = 1, **recursion: object
) -> ConfigDict:
    """`m` segments of `t` rounds, the gradient through the last `window` updates of each."""
    config = preset(
        name,
        (0, 2, 0),
        (n + 1) * t * m,
        {"norm_placement": "post", "networks": networks},
        {
            "state": "drawn",
            "injection": "add",
            "inner": n,
            "segments": m,
            "gradient_steps": window,
            "loss": "uniform" if m > 1 else "final",
            **recursion,
        },
    )
    config.optim.peak_lr /= 3  # norms after the residuals, as in ut.py
    config.optim.ema = 0.999
    return config
