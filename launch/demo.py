"""The whole story in minutes: train a Mixture-of-Recursions model and its plain-Transformer twin,
compare, generate.

    python -m launch.demo
    python -m launch.demo --workdir runs/demo --flops 2e12

Both read the same text (this computer's Python library) and spend the same training FLOPs, after
the paper's accounting. Leaves two checkpoints, report.html, and a picture of how deep each token
thought. Then the model that comes with the package (docs/native.md) leads the runtime: it finds one
value in ten million tokens. What is already there is not done again.
"""

import dataclasses
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.rule import Rule
from rich.syntax import Syntax

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
from rlm_runtime import RLM, tasks
from rlm_runtime.lms import resolve
from rlm_runtime.trajectory import CellEnd, CellStart
from rlm_runtime.trajectory import read as read_trajectory

_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Where the two runs and the report go.")
_FLOPS = flags.DEFINE_float(
    "flops", 0.0, "Training budget of each model instead of the configuration's; 2e12 is quick."
)
_PROMPT = flags.DEFINE_string("prompt", "def __init__(self, ", "Text that both models continue.")

KINDS = ("mor", "vanilla")
HAYSTACK = 10_000_000  # tokens of the text that the package's model looks through
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
    console.print(Rule(f"a value in {HAYSTACK:,} tokens"))
    find(console, Path(_WORKDIR.value) / "haystack")
    console.print(
        f"\nReport: {page}\nHow deep each token thought: {picture}\nTry: python -m launch.generate "
        f"--checkpoint {runs[0]} --prompt 'import ' --show_depth"
    )


def find(console: Console, folder: Path, tokens: int = HAYSTACK) -> bool:
    """Let the package's model answer a question over a text of that length; was it right?"""
    task = tasks.get("s_niah")
    example = task.example(tokens, folder=folder)
    size = example.context.stat().st_size
    console.print(f"{example.context}, {size:,} bytes\n{example.question}", markup=False)
    with RLM(resolve("native"), budget={"turns": 6}, log_dir=folder / "runs") as rlm:
        result = rlm.completion(example.context, example.question)
    for event in read_trajectory(result.trajectory) if result.trajectory else ():
        if isinstance(event, CellStart):
            console.print(Syntax(event.code, "python", word_wrap=True))
        elif isinstance(event, CellEnd):
            console.print(event.result.stdout.strip(), style="dim", markup=False)
    right = task.score(example, result.answer) == 1
    console.print(
        f"{result.answer} ({'right' if right else f'wrong: {example.answer[0]}'}), {result.turns} turns, "
        f"{result.seconds:.1f} s with loading and compiling. Look at it with: rlm view {folder / 'runs'}",
        markup=False,
    )
    return right


if __name__ == "__main__":
    cli.run(main)
