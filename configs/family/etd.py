"""Encode-Think-Decode (arXiv 2510.07358): repeat a few middle layers of a network.

    python -m launch.train --config configs/family/etd.py --workdir runs/etd

Argument: k, the repetitions. Reproduced: the program, here 2-2*k-2 (the paper's, on OLMo-2 1B:
7-4*k-5), no injection, the full gradient. Not reproduced: the paper repeats layers of a pretrained
model in mid-training, at a cut found by the angles between layers; trained from scratch, as here,
expect what a recursive Transformer with longer ends gives.
"""

from ml_collections import ConfigDict

from configs import arguments
from configs.family.base import preset


def get_config(arg: str = "") -> ConfigDict:
    k = arguments.parse(arg, k=3)["k"]
    return preset(f"etd-k{k}", (2, 2, 2), k)
