"""A model of configs/sft.py that learns which of two replies is better (DPO, arXiv 2305.18290).

    python -m launch.train --config configs/dpo.py --workdir runs/preferred \\
        --init_from runs/chat \\
        --config.data.paths="('pairs/*.jsonl',)" --config.data.tokenizer=runs/chat/tokenizer.json

Each line of a file is {"chosen": MESSAGES, "rejected": MESSAGES}, lists of {"role": "...",
"content": "..."} as for configs/sft.py; or {"prompt": ..., "chosen": ..., "rejected": ...}, each
messages or plain text. What both conversations begin with has no loss. The weights of --init_from
are the reference that the model is held to.

Argument: that of configs/quickstart.py, mor (default) | vanilla | recursive.
"""

from ml_collections import ConfigDict

from configs import sft


def get_config(arg: str = "") -> ConfigDict:
    config = sft.get_config(arg)
    config.name = config.name.replace("-sft", "-dpo")
    config.data.format = "preference"
    config.data.paths = ("pairs/*.jsonl",)
    config.preference.beta = 0.1
    # The paper's rate, 1e-6, is for models of billions of parameters.
    config.optim.peak_lr = 1e-4
    config.optim.weight_decay = 0.0
    config.train.flops = 1e11
    return config
