"""What a run will be, before anything is compiled: program, parameters, FLOPs, steps, cache,
memory, time.

    python -m launch.inspect --config configs/mor.py:360m,nr=3
    python -m launch.inspect --config configs/mor.py:1.7b,nr=3 --devices 8 --mfu 0.5 \\
        --config.mesh.fsdp=8
    python -m launch.inspect --checkpoint runs/mor --context 4096 --json

It reads no corpus and trains no tokenizer. Two kinds of FLOPs are printed: the paper's, forward
only, in which a budget (config.train.flops) is given and which set the number of steps; and true
ones, for time and MFU. Memory and time are those of each device; the activation estimate and its
formula are in mor_jax/analysis/memory.py. With --checkpoint the cache is counted at the depths that
the run's last evaluation measured.

From a notebook:

    from mor_jax.analysis.inspection import inspect_config
    inspect_config(from_config_dict(mor.get_config("360m,nr=3")))["run"]["steps"]
"""

import json

from absl import flags
from rich.console import Console

from launch import cli
from mor_jax.analysis.inspection import inspect_config, inspection_tables
from mor_jax.errors import UserError
from mor_jax.train.load import describe

_CONFIG = cli.define_config()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A run directory, or its checkpoints/, instead of --config."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; the newest by default.")
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "Devices to count for; this machine's do not matter.", lower_bound=1
)
_MFU = flags.DEFINE_float(
    "mfu", 0.4, "Share of the chips' dense peak that a step is assumed to reach."
)
_CONTEXT = flags.DEFINE_integer(
    "context", None, "Tokens in the cache when decoding; the model's context by default."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


def main(_: list[str]) -> None:
    if (_CONFIG.value is None) == (_CHECKPOINT.value is None):
        raise UserError(
            "give either --config or --checkpoint, e.g. --config configs/mor.py:360m,nr=3."
        )
    if _CHECKPOINT.value:
        config, active = describe(_CHECKPOINT.value, _STEP.value)
    else:
        config, active = cli.read_config(_CONFIG, devices=_DEVICES.value), None
    report = inspect_config(
        config, devices=_DEVICES.value, mfu=_MFU.value, context=_CONTEXT.value, mean_active=active
    )
    if _JSON.value:
        print(json.dumps(report, indent=1))
        return
    for part in inspection_tables(report):
        Console(highlight=False).print(part)


if __name__ == "__main__":
    cli.run(main)
