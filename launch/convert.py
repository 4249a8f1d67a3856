"""Initialise a recursive model from an unshared checkpoint: step 0 of a new run.

    python -m launch.convert --checkpoint runs/vanilla --config configs/quickstart.py:recursive --workdir runs/up
    python -m launch.convert --checkpoint runs/vanilla --config configs/quickstart.py --method average --workdir runs/up2
    python -m launch.train --config configs/quickstart.py:recursive --workdir runs/up     # goes on from there

Each shared block is filled from source layers: stepwise takes them at equal intervals, average the mean of all layers
that are tied into one, lower and upper the first or the last ones, random a draw. Blocks before and after the
recursion are the source's first and last. Optimiser, schedule and routers start fresh. Widths, heads and tokenizer are
the source's; the corpus may be another one (then --config.data.tokenizer=runs/vanilla/tokenizer.json).

With config.model.lora_rank or norms = 'own', --relaxation svd starts each recursion from the layer it stands for.

From a notebook:

    from mor_jax.train.convert import convert_checkpoint
    convert_checkpoint("runs/vanilla", from_config_dict(quickstart.get_config("recursive")), "runs/up", "stepwise")
"""

from absl import flags
from rich.console import Console

from launch import cli
from mor_jax.analysis.drawing import draw_program, draw_sources
from mor_jax.model.convert import METHODS
from mor_jax.model.relax import RELAXATIONS
from mor_jax.train.convert import convert_checkpoint

_CONFIG = cli.define_config()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Unshared run directory, or its checkpoints/.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Its checkpoint step; the newest by default.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The new run directory.", required=True)
_METHOD = flags.DEFINE_enum("method", "stepwise", METHODS, "How shared blocks are made of source layers.")
_RELAXATION = flags.DEFINE_enum(
    "relaxation",
    "zero",
    RELAXATIONS,
    "Of a relaxed target: start as the tied model, or from each recursion's own layer.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the method random.")


def main(_: list[str]) -> None:
    done = convert_checkpoint(
        _CHECKPOINT.value, cli.read_config(_CONFIG), _WORKDIR.value, _METHOD.value, step=_STEP.value, seed=_SEED.value,
        relaxation=_RELAXATION.value,
    )  # fmt: skip
    Console(highlight=False, soft_wrap=True).print(
        f"{draw_program(done.config.model)}\n{draw_sources(done.table)}\n"
        f"Wrote step 0 to {_WORKDIR.value}, from step {done.source_step} of {_CHECKPOINT.value} ({_METHOD.value}). "
        f"launch.train with the same --config and --workdir goes on from it."
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
