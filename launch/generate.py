"""Generate text with a trained model, streaming.

    python -m launch.generate --checkpoint runs/mor --prompt "def main("
    python -m launch.generate --checkpoint runs/mor --prompt "class " --temperature 0.8 --top_p 0.95 --show_depth
    python -m launch.generate --checkpoint runs/mor --prompt "class " --mean_depth 1.5 --max_depth 2
    cat notes.txt | python -m launch.generate --checkpoint runs/mor --max_tokens 50

Without --prompt it reads standard input. --show_depth colours each token by the number of recursions it ran.
--mean_depth turns the dial of a routed model: how many recursions a token runs on average.

From a notebook:

    from mor_jax.train.load import load_model
    from mor_jax.inference.text import stream_text
    for piece in stream_text(load_model("runs/mor"), "def main("): print(piece.text, end="")
"""

import sys

from absl import flags
from rich.console import Console

from launch import cli
from mor_jax.analysis.depth_map import depth_ansi, depth_legend_ansi
from mor_jax.data.tokenizer import load_tokenizer
from mor_jax.errors import UserError
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import stream_text
from mor_jax.train.curve import surveyed
from mor_jax.train.load import check_tokenizer, load_model

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run directory, or its checkpoints/.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; the newest by default.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; standard input by default.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 200, "New tokens at most; the model's context is a limit too.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k most likely tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the most likely tokens that hold this much probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same text.")
_MEAN_DEPTH = flags.DEFINE_float("mean_depth", None, "Mean recursions a token runs; default: the model's own rule.")
_MIN_DEPTH = flags.DEFINE_integer("min_depth", None, "Recursions every token runs at least.")
_MAX_DEPTH = flags.DEFINE_integer("max_depth", None, "Recursions a token runs at most.")
_SHOW_DEPTH = flags.DEFINE_bool("show_depth", False, "Colour each token by its recursion depth.")
_ECHO = flags.DEFINE_bool("echo", True, "Print the prompt before its continuation.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json to use instead; it must be the model's own.")


def main(_: list[str]) -> None:
    prompt = _PROMPT.value
    if prompt is None:
        if sys.stdin.isatty():
            print("Reading the prompt from standard input; end it with Ctrl-D.", file=sys.stderr)
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")  # whatever the locale says
        except UnicodeDecodeError as e:
            raise UserError(f"the prompt on standard input is not UTF-8 text ({e.reason} at byte {e.start}).") from e
    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    loaded = load_model(_CHECKPOINT.value, _STEP.value)
    if _TOKENIZER.value:
        check_tokenizer(loaded, load_tokenizer(_TOKENIZER.value), _TOKENIZER.value)
    console = Console(highlight=False, soft_wrap=True, force_terminal=True if _SHOW_DEPTH.value else None)
    recursions = loaded.lm.program.recursions
    if _MEAN_DEPTH.value is not None:
        loaded = surveyed(loaded)
    pieces = stream_text(
        loaded, prompt, max_tokens=_MAX_TOKENS.value, sampling=sampling, seed=_SEED.value,
        mean_depth=_MEAN_DEPTH.value, min_depth=_MIN_DEPTH.value, max_depth=_MAX_DEPTH.value,
    )  # fmt: skip
    for piece in pieces:
        if piece.in_prompt and not _ECHO.value:
            continue
        if _SHOW_DEPTH.value:
            console.print(depth_ansi([piece.text], [piece.depth], recursions), end="")
        else:
            print(piece.text, end="", flush=True)
    print()
    if _SHOW_DEPTH.value:
        console.print(depth_legend_ansi(recursions))


if __name__ == "__main__":
    cli.run(main)
