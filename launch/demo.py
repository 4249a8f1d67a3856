"""The whole story in minutes: train a Mixture-of-Recursions model and its plain-Transformer twin,
compare, generate.

    python -m launch.demo
    python -m launch.demo --workdir runs/demo --flops 2e12

Both read the same text (this computer's Python library) and spend the same training FLOPs, after
the paper's accounting. Leaves two checkpoints, report.html, and a picture of how deep each token
thought. What is already there is not done again.
"""

import dataclasses

from absl import flags
from rich.console import Console
from rich.rule import Rule

from configs import quickstart
from launch import cli
from mor_jax.analysis.depth_map import depth_ansi, depth_legend_ansi, save_depth_png
from mor_jax.config import from_config_dict
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import stream_text
from mor_jax.paths import as_path
from mor_jax.train.load import load_model
from mor_jax.train.loop import train
from mor_jax.train.present import present, read

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where the two runs and the report go.")
_FLOPS = flags.DEFINE_float(
    "flops", 0.0, "Training budget of each model instead of the configuration's; 2e12 is quick."
)
_PROMPT = flags.DEFINE_string("prompt", "def __init__(self, ", "Text that both models continue.")

KINDS = ("mor", "vanilla")
PASSAGE = 1200  # characters of held-out text shown with their depths


def main(_: list[str]) -> None:
    console, root = Console(highlight=False), as_path(_WORKDIR.value)
    runs = [root / kind for kind in KINDS]
    for kind, run in zip(KINDS, runs, strict=True):
        console.print(Rule(f"training {kind}"))
        cfg = from_config_dict(quickstart.get_config(kind))
        if _FLOPS.value:
            cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, flops=_FLOPS.value))
        if not train(cfg, run).get("finished"):
            console.print("Stopped early; the same command goes on from here.")
            return

    for run in runs:
        loaded = load_model(run)
        console.print(Rule(f"{loaded.config.name} continues {_PROMPT.value!r}"))
        recursions = loaded.lm.program.recursions
        for piece in stream_text(
            loaded, _PROMPT.value, max_tokens=120, sampling=Sampling(0.7, top_p=0.95)
        ):
            console.print(
                depth_ansi([piece.text], [piece.depth], recursions), end="", soft_wrap=True
            )
        console.print("\n", depth_legend_ansi(recursions))

    console.print(Rule("the comparison"))
    page = present(runs, root / "report.html")
    mor = load_model(runs[0])
    found = read(mor, (runs[0] / "sample.txt").read_text(encoding="utf-8")[:PASSAGE], stretches=1)
    picture = root / "depth.png"
    save_depth_png(found.tokens, found.depths, mor.lm.program.recursions, picture)
    console.print(
        f"\nReport: {page}\nHow deep each token thought: {picture}\nTry: python -m launch.generate "
        f"--checkpoint {runs[0]} --prompt 'import ' --show_depth"
    )


if __name__ == "__main__":
    cli.run(main)
