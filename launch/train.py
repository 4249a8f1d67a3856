"""Train a model, or go on with a run that was stopped.

    python -m launch.train --config configs/quickstart.py --workdir runs/mor
    python -m launch.train --config configs/quickstart.py --workdir runs/short --config.train.steps=200
    python -m launch.train --config configs/mor.py:360m,nr=3 --workdir runs/mor360 \\
        --config.data.source=files --config.data.paths="('/data/*.jsonl.zst',)"

The run directory receives config.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the end,
summary.json. The same command on the same directory resumes. Ctrl-C or SIGTERM saves first and exits with 0.

From a notebook:

    from mor_jax.config import from_config_dict
    from mor_jax.train.loop import train
    summary = train(from_config_dict(quickstart.get_config()), "runs/mor")
"""

from absl import flags

from launch import cli
from mor_jax.train.loop import train

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; created, or resumed if it holds this run.", required=True
)


def main(_: list[str]) -> None:
    train(cli.read_config(_CONFIG), _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
