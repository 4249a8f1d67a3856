"""Generate text with a trained model, streaming.

    python -m launch.generate --checkpoint runs/mor --prompt "def main("
    python -m launch.generate --checkpoint runs/mor --prompt "class " --temperature 0.8 \\
        --top_p 0.95 --show_depth
    python -m launch.generate --checkpoint runs/mor --prompt "class " --mean_depth 1.5 --max_depth 2
    python -m launch.generate --checkpoint runs/mor --prompts questions.txt --n 4 --stop "\\n\\n" \\
        --min_p 0.05
    python -m launch.generate --checkpoint runs/huginn --prompt "def " --recursions 12 \\
        --exit latent --exit_threshold 0.03 --show_depth
    cat notes.txt | python -m launch.generate --checkpoint runs/mor --max_tokens 50

Without --prompt it reads standard input. --show_depth colours each token by the number of
recursions it ran. --mean_depth turns the dial of a routed model: how many recursions a token runs
on average. A model of fixed depth runs at any number of --recursions, and with an --exit rule stops
each token by itself.

--prompts reads a prompt from each line of a text file, or from the field "prompt" of each line of a
.jsonl file; all of them are decoded in one batch. With --prompts, or --n above 1, standard output
gets a JSON object a line: prompt, index, text, finish.

From a notebook:

    from mor_jax.train.load import load_model
    from mor_jax.inference.text import stream_text
    for piece in stream_text(load_model("runs/mor"), "def main("): print(piece.text, end="")
"""

import json
import sys

from absl import flags
from jax.sharding import Mesh
from rich.console import Console

from launch import cli
from mor_jax.analysis.depth_map import depth_ansi, depth_legend_ansi
from mor_jax.config import Config
from mor_jax.data.tokenizer import load_tokenizer
from mor_jax.errors import UserError
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import complete, stream_text
from mor_jax.parallel.serving import serving_mesh
from mor_jax.paths import as_path
from mor_jax.train.curve import surveyed
from mor_jax.train.load import check_tokenizer, load_model

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Run directory, or its checkpoints/.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; the newest by default.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; standard input by default.")
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 200, "New tokens at most; the model's context is a limit too."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k most likely tokens; 0: all.")
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Draw among the most likely tokens that hold this much probability."
)
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Draw no token less likely than this share of the likeliest; 0: off."
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "End a text before this string; \\n is a line's end; repeatable."
)
_N = flags.DEFINE_integer(
    "n", 1, "Continuations of each prompt; the i-th draws with seed + i.", lower_bound=1
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "A file of prompts, .jsonl or a prompt a line, instead of --prompt."
)
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same text.")
_MEAN_DEPTH = flags.DEFINE_float(
    "mean_depth", None, "Mean recursions a token runs; default: the model's own rule."
)
_MIN_DEPTH = flags.DEFINE_integer("min_depth", None, "Recursions every token runs at least.")
_MAX_DEPTH = flags.DEFINE_integer("max_depth", None, "Recursions a token runs at most.")
_RECURSIONS = flags.DEFINE_integer(
    "recursions", None, "Recursions at most, also past those of training; fixed depth only."
)
_EXIT = flags.DEFINE_string(
    "exit", None, "When a token stops, as config.recursion.exit: latent, kl, ...; fixed depth only."
)
_EXIT_THRESHOLD = flags.DEFINE_float("exit_threshold", 0.0, "Of --exit; at 0 nothing stops early.")
_SHOW_DEPTH = flags.DEFINE_bool("show_depth", False, "Colour each token by its recursion depth.")
_ECHO = flags.DEFINE_bool("echo", True, "Print the prompt before its continuation.")
_MESH = flags.DEFINE_string(
    "mesh", None, "tensor=N: cut the weights over N devices. Without it each device has a copy."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A tokenizer.json to use instead; it must be the model's own."
)


def main(_: list[str]) -> None:
    if _PROMPT.value is not None and _PROMPTS.value is not None:
        raise UserError("give --prompt or --prompts, not both.")
    several = _PROMPTS.value is not None or _N.value > 1
    if _SHOW_DEPTH.value and (several or _STOP.value):
        raise UserError(
            "--show_depth colours one text as it appears; it goes with neither --prompts, --n nor --stop."
        )
    prompt = _PROMPT.value or ""
    if _PROMPT.value is None and _PROMPTS.value is None:
        if sys.stdin.isatty():
            print("Reading the prompt from standard input; end it with Ctrl-D.", file=sys.stderr)
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")  # whatever the locale says
        except UnicodeDecodeError as e:
            raise UserError(
                f"the prompt on standard input is not UTF-8 text ({e.reason} at byte {e.start})."
            ) from e
    sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value)
    prompts = read_prompts(_PROMPTS.value) if _PROMPTS.value is not None else [prompt]
    loaded = load_model(_CHECKPOINT.value, _STEP.value, mesh=mesh_of if _MESH.value else None)
    if _RECURSIONS.value is not None:
        loaded = loaded._replace(lm=loaded.lm.at_depth(_RECURSIONS.value))
    if _EXIT.value is not None:
        loaded = loaded._replace(lm=loaded.lm.with_exit(_EXIT.value, _EXIT_THRESHOLD.value))
    if _TOKENIZER.value:
        check_tokenizer(loaded, load_tokenizer(_TOKENIZER.value), _TOKENIZER.value)
    console = Console(
        highlight=False, soft_wrap=True, force_terminal=True if _SHOW_DEPTH.value else None
    )
    recursions = loaded.lm.program.recursions
    if _MEAN_DEPTH.value is not None:
        loaded = surveyed(loaded)
    if several or _STOP.value:
        stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in _STOP.value]
        found = complete(
            loaded,
            prompts,
            n=_N.value,
            stop=stop,
            max_tokens=_MAX_TOKENS.value,
            sampling=sampling,
            seed=_SEED.value,
            mean_depth=_MEAN_DEPTH.value,
            min_depth=_MIN_DEPTH.value,
            max_depth=_MAX_DEPTH.value,
        )
        for done in found:
            echo = done.prompt if _ECHO.value else ""
            print(
                json.dumps(done._asdict(), ensure_ascii=False) if several else f"{echo}{done.text}"
            )
        return
    pieces = stream_text(
        loaded,
        prompt,
        max_tokens=_MAX_TOKENS.value,
        sampling=sampling,
        seed=_SEED.value,
        mean_depth=_MEAN_DEPTH.value,
        min_depth=_MIN_DEPTH.value,
        max_depth=_MAX_DEPTH.value,
    )
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


def mesh_of(config: Config) -> Mesh:
    """The mesh of --mesh. Raises ConfigError where it does not cut the model in equal parts."""
    return serving_mesh(_MESH.value or "", config.model)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file. Raises UserError naming the line that has none."""
    try:
        lines = as_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path}: cannot be read as text ({e}).") from e
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.endswith(".jsonl"):
            try:
                line = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(
                    f'--prompts {path}, line {number}: expected a JSON object with a field "prompt".'
                ) from e
            if not isinstance(line, str):
                raise UserError(f"--prompts {path}, line {number}: the prompt must be text.")
        found.append(line)
    if not found:
        raise UserError(f"--prompts {path} has no prompt.")
    return found


if __name__ == "__main__":
    cli.run(main)
