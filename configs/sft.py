"""A model of configs/quickstart.py, trained on conversations: only what the assistant says has a
loss.

    python -m launch.train --config configs/sft.py --workdir runs/chat --init_from runs/mor \\
        --config.data.paths="('chats/*.jsonl',)" --config.data.tokenizer=runs/mor/tokenizer.json

Each line of a file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}; a message may have a "weight" of its own. Without --init_from the model starts
from nothing. How many replies of other conversations it then gives exactly:

    python -m launch.evaluate --checkpoint runs/chat --chat chats/test.jsonl

Argument: that of configs/quickstart.py, mor (default) | vanilla | recursive.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(arg: str = "") -> ConfigDict:
    config = quickstart.get_config(arg)
    config.name = f"{config.name}-sft"
    config.data.source = "files"
    config.data.format = "chat"
    config.data.paths = ("chats/*.jsonl",)
    config.optim.peak_lr = 1e-3  # a fifth of pretraining's
    config.train.flops = 5e11
    return config
