"""Universal Transformer at fixed depth (arXiv 1807.03819): one block, a timing signal at every
step.

    python -m launch.train --config configs/family/ut.py --workdir runs/ut

Argument: r, the steps. Reproduced: one shared block, the sinusoidal signal of the step added each
time, norms after the residuals. Not reproduced: position signals at every step (rotary embedding
does that here) and halting by ACT. Norms after the residuals want a smaller learning rate than the
others: it is set to a third.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    r = arguments.parse(arg, r=6)["r"]
    config = preset(
        f"ut-r{r}", (0, 1, 0), r, {"norm_placement": "post"}, {"conditioning": "sinusoid"}
    )
    config.optim.peak_lr /= 3
    return config
