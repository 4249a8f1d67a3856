"""Make a checkpoint of another one: of published weights, of an unshared model, or for other tools.

Published weights become a run directory; a safetensors directory as Hugging Face writes it, or a
GGUF file:

    python -m launch.convert --from hf:DIR --workdir runs/smollm2
    python -m launch.convert --from model.gguf --workdir runs/smollm2 --context 2048

Llama, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3 are read, with tokenizer, chat template and the
tokens that end a text (the extra `weights`). The result is evaluated, generated from, served, and
converted like any run; to train it, convert it first.

A model is written for other tools, a plain one or one of fixed recursions (unrolled) as a Llama or
Qwen, any other with PyTorch code of its own, which transformers runs with trust_remote_code:

    python -m launch.convert --checkpoint runs/vanilla --to hf:DIR
    python -m launch.convert --checkpoint runs/mor --to hf:DIR

Any model is written as two small files to ship, weights.npz in bfloat16 and model.json, which are
read like a run:

    python -m launch.convert --checkpoint runs/mor --to bundle:DIR

The weights alone, with fine-tuned adapters merged into them:

    python -m launch.convert --checkpoint runs/lora --merge --workdir runs/merged

A checkpoint initialises a recursive model, as step 0 of a new run:

    python -m launch.convert --checkpoint runs/vanilla --config configs/quickstart.py:recursive \\
        --workdir runs/up
    python -m launch.convert --checkpoint runs/vanilla --config configs/quickstart.py \\
        --method average --workdir runs/up2
    # goes on from there
    python -m launch.train --config configs/quickstart.py:recursive --workdir runs/up

Each shared block is filled from source layers: stepwise takes them at equal intervals, average the
mean of all layers that are tied into one, lower and upper the first or the last ones, random a
draw. Blocks before and after the recursion are the source's first and last. Of a recursive source
these are the layers it unrolls to; keep, its default, takes its blocks as they are, for more or
fewer recursions or a router. Optimiser, schedule and routers start fresh. Widths, heads and
tokenizer are the source's; the corpus may be another one (then
--config.data.tokenizer=runs/vanilla/tokenizer.json).

With config.model.lora_rank or norms = 'own', --relaxation svd starts each recursion from the layer
it stands for.

From a notebook:

    from mor_jax.train.convert import convert_checkpoint
    convert_checkpoint("runs/vanilla", from_config_dict(quickstart.get_config("recursive")),
        "runs/up", "stepwise")
"""

import time

from absl import flags
from rich.console import Console

from launch import cli
from mor_jax.analysis.drawing import draw_program, draw_sources
from mor_jax.errors import UserError
from mor_jax.model.convert import METHODS
from mor_jax.model.relax import RELAXATIONS
from mor_jax.train.convert import convert_checkpoint, merge_checkpoint
from mor_jax.train.load import load_model, save_bundle
from mor_jax.weights.exporting import export_weights
from mor_jax.weights.importing import import_weights

_CONFIG = cli.define_config()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, or its checkpoints/.")
_FROM = flags.DEFINE_string(
    "from", None, "Published weights instead of --checkpoint: hf:DIRECTORY or FILE.gguf."
)
_TO = flags.DEFINE_string(
    "to",
    None,
    "Write the checkpoint for other tools instead: hf:DIRECTORY, or bundle:DIRECTORY to ship.",
)
_REMOTE_CODE = flags.DEFINE_bool(
    "remote_code",
    None,
    "Of --to=hf:: write PyTorch code beside the weights, which keeps shared blocks shared; default: "
    "where no published architecture computes the model.",
)
_MERGE = flags.DEFINE_bool(
    "merge", False, "Write the weights alone, fine-tuned adapters merged, into --workdir."
)
_CONTEXT = flags.DEFINE_integer(
    "context", 0, "Of --from: longest sequence, tokens; 0: the model's own.", lower_bound=0
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "Of --from: a tokenizer.json instead of the one that comes with it."
)
_STEP = flags.DEFINE_integer("step", None, "Its checkpoint step; the newest by default.")
_AVERAGE = flags.DEFINE_bool(
    "average", False, "Take the running mean of the weights (config.optim.ema)."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The new run directory.")
_METHOD = flags.DEFINE_enum(
    "method",
    None,
    METHODS,
    "How blocks are made of source layers; default: stepwise, of a recursive source keep.",
)
_RELAXATION = flags.DEFINE_enum(
    "relaxation",
    "zero",
    RELAXATIONS,
    "Of a relaxed target: start as the tied model, or from each recursion's own layer.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the method random.")


def main(_: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    checkpoint = _CHECKPOINT.value or ""
    if (_FROM.value is None) == (_CHECKPOINT.value is None):
        raise UserError("give --from (published weights) or --checkpoint (a run of this project).")
    if _FROM.value is not None:
        _refuse("from", to=_TO.value, config=_CONFIG.value, step=_STEP.value)
        console.print(_import(_FROM.value, _required("workdir", _WORKDIR.value)))
    elif _TO.value is not None:
        _refuse("to", workdir=_WORKDIR.value, config=_CONFIG.value)
        console.print(_export(checkpoint, _TO.value))
    elif _MERGE.value:
        _refuse("merge", config=_CONFIG.value)
        workdir = _required("workdir", _WORKDIR.value)
        step = merge_checkpoint(checkpoint, workdir, step=_STEP.value, average=_AVERAGE.value)
        console.print(f"Wrote the weights of step {step} of {checkpoint} to {workdir}.")
    else:
        console.print(_recurse(checkpoint, _required("workdir", _WORKDIR.value)))


def _import(source: str, workdir: str) -> str:
    began = time.monotonic()
    done = import_weights(source, workdir, context=_CONTEXT.value, tokenizer=_TOKENIZER.value)
    names = ", ".join(done.tokenizer.token_text(i) for i in sorted(done.tokenizer.ends))
    return (
        f"{draw_program(done.config.model)}\n"
        f"Wrote {done.parameters:,} parameters to {workdir} in {time.monotonic() - began:.0f} s, context "
        f"{done.config.model.context:,}. Texts {'begin' if done.tokenizer.add_bos else 'do not begin'} with "
        f"{done.tokenizer.token_text(done.tokenizer.bos)} and end at {names}; chat template: "
        f"{'none' if done.template.plain else 'its own'}."
    )


def _export(checkpoint: str, to: str) -> str:
    if to.startswith("bundle:"):
        loaded = load_model(checkpoint, _STEP.value)
        size = save_bundle(loaded, to.removeprefix("bundle:"))
        return f"Wrote step {loaded.step} of {checkpoint} to {to.removeprefix('bundle:')}: {size:,} bytes."
    if not to.startswith("hf:"):
        raise UserError(f"--to={to}: expected hf:DIRECTORY or bundle:DIRECTORY.")
    done = export_weights(
        checkpoint,
        to,
        step=_STEP.value,
        average=_AVERAGE.value,
        remote_code=_REMOTE_CODE.value,
    )
    coded = done.architecture == "mor"
    return (
        f"Wrote step {done.step} of {checkpoint} to {to.removeprefix('hf:')}: {done.architecture}, {done.layers} "
        f"layers, {len(done.files)} file{'s' if len(done.files) > 1 else ''} of float32"
        f"{', and the code that computes it (trust_remote_code=True)' if coded else ''}."
    )


def _recurse(checkpoint: str, workdir: str) -> str:
    done = convert_checkpoint(
        checkpoint,
        cli.read_config(_CONFIG),
        workdir,
        _METHOD.value or "",
        step=_STEP.value,
        seed=_SEED.value,
        relaxation=_RELAXATION.value,
        average=_AVERAGE.value,
    )
    return (
        f"{draw_program(done.config.model)}\n{draw_sources(done.table)}\n"
        f"Wrote step 0 to {workdir}, from step {done.source_step} of {checkpoint} ({done.method}). "
        f"launch.train with the same --config and --workdir goes on from it."
    )


def _required(name: str, value: str | None) -> str:
    if value is None:
        raise UserError(f"--{name} is missing.")
    return value


def _refuse(flag: str, **others: object) -> None:
    """Raise UserError for flags that mean nothing beside `flag`."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise UserError(f"--{given[0]} means nothing with --{flag}.")


if __name__ == "__main__":
    cli.run(main)
