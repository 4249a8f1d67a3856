"""Loss against depth on one checkpoint: the mean-depth dial, and test-time scaling under a cap on
depth.

    python -m launch.depth_curve --checkpoint runs/mor
    python -m launch.depth_curve --checkpoint runs/mor --points 5 --out curve
    python -m launch.depth_curve --checkpoint runs/mor --paths "corpus/*.txt" --calibrate_rows 256

Prints a table and writes OUT.json and OUT.png. The dial asks for mean depths from 1 to R recursions
by thresholds read off the router scores that training has surveyed; the cap lets tokens run at most
1..R recursions under the rule the model was configured with. All of it causal, on held-out text.

From a notebook:

    from mor_jax.train.curve import depth_curve
    from mor_jax.train.load import load_model
    record = depth_curve(load_model("runs/mor"))
"""

import json

from absl import flags
from rich.console import Console

from launch import cli
from mor_jax.analysis.canvas import save_png
from mor_jax.analysis.plots import depth_curve as draw
from mor_jax.analysis.tables import depth_curve_table
from mor_jax.errors import UserError
from mor_jax.paths import as_path, write_text
from mor_jax.train.curve import depth_curve
from mor_jax.train.load import load_model

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Run directory, or its checkpoints/.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; the newest by default.")
_POINTS = flags.DEFINE_integer("points", 9, "Settings of the dial, evenly from 1 to R recursions.")
_PATHS = flags.DEFINE_list(
    "paths", [], "Files (globs) to evaluate on instead of the run's held-out documents."
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key", "text", "Field that holds the text of jsonl and parquet files."
)
_ROWS = flags.DEFINE_integer("rows", None, "Rows to read at most; 0: all; default: as in training.")
_BATCH = flags.DEFINE_integer(
    "batch_size", 8, "Rows at a time; divisible by the number of devices."
)
_CALIBRATE = flags.DEFINE_integer(
    "calibrate_rows",
    0,
    "Survey the router scores anew on so many training rows; 0: what the checkpoint carries.",
)
_OUT = flags.DEFINE_string(
    "out", "depth_curve", "Where the numbers (.json) and the picture (.png) go."
)


def main(_: list[str]) -> None:
    loaded = load_model(_CHECKPOINT.value, _STEP.value)
    record = depth_curve(
        loaded,
        tuple(_PATHS.value),
        points=_POINTS.value,
        calibration_rows=_CALIBRATE.value,
        text_key=_TEXT_KEY.value,
        rows=_ROWS.value,
        batch_size=_BATCH.value,
    )
    Console().print(depth_curve_table(f"{loaded.config.name}, step {loaded.step}", record))
    # Not `with_suffix`: the name may have a dot of its own.
    numbers, picture = as_path(f"{_OUT.value}.json"), as_path(f"{_OUT.value}.png")
    try:
        write_text(numbers, json.dumps({"step": loaded.step, **record}, indent=1) + "\n")
        save_png(draw(record), picture)
    except OSError as e:
        raise UserError(f"cannot write {numbers} and {picture}: {e.strerror or e}.") from e
    print(f"wrote {numbers} and {picture}")


if __name__ == "__main__":
    cli.run(main)
