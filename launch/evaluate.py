"""Evaluate a checkpoint on held-out text: top-k and causal (threshold) loss, side by side.

    python -m launch.evaluate --checkpoint runs/mor
    python -m launch.evaluate --checkpoint runs/mor --step 400 --rows 0 --out mor.json
    python -m launch.evaluate --checkpoint runs/mor --paths "corpus/*.txt,more.jsonl.gz"
    python -m launch.evaluate --checkpoint runs/mor --weights int8
    python -m launch.evaluate --checkpoint runs/chat --chat "chats/test.jsonl" --out replies.json

With --chat: the last reply of each conversation is generated anew, greedily, and compared with the
one in the file.

With --weights int8: also with the matrices rounded as launch.serve --weights int8 keeps them, and
what that costs in loss.

Without --paths: the held-out documents of the run's own corpus. With it: all text of these files.
The causal loss is what generation gets; top-k routing sees the row's future and is printed for
comparison with published numbers.

From a notebook:

    from mor_jax.train.load import load_model
    from mor_jax.train.score import score
    record = score(load_model("runs/mor"))
"""

import json
from typing import Any

from absl import flags
from rich.console import Console

from launch import cli
from mor_jax.analysis.tables import evaluation_table
from mor_jax.data.tokenizer import load_tokenizer
from mor_jax.errors import UserError
from mor_jax.inference.engine import layers
from mor_jax.train.load import Loaded, check_tokenizer, load_model
from mor_jax.train.replies import answer, to_json
from mor_jax.train.score import score

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Run directory, or its checkpoints/.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; the newest by default.")
_AVERAGE = flags.DEFINE_bool(
    "average", False, "The running mean of the weights (config.optim.ema) instead of them."
)
_PATHS = flags.DEFINE_list(
    "paths", [], "Files (globs) to evaluate on instead of the run's held-out documents."
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key", "text", "Field that holds the text of jsonl and parquet files."
)
_CHAT = flags.DEFINE_list(
    "chat", [], "Files (globs) of conversations whose last replies are generated and compared."
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 200, "Of --chat: longest reply, tokens.", lower_bound=1
)
_ROWS = flags.DEFINE_integer(
    "rows", None, "Rows or conversations to read at most; 0: all; default: as in training."
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 8, "Rows at a time; divisible by the number of devices."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "compute", ["compute", "int8"], "int8: also measure what 8-bit weights cost."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "A tokenizer.json to use instead; it must be the model's own."
)
_OUT = flags.DEFINE_string("out", None, "Also write the numbers to this JSON file.")


def main(_: list[str]) -> None:
    loaded = load_model(_CHECKPOINT.value, _STEP.value, average=_AVERAGE.value)
    if _TOKENIZER.value:
        check_tokenizer(loaded, load_tokenizer(_TOKENIZER.value), _TOKENIZER.value)
    if _CHAT.value:
        if _PATHS.value:
            raise UserError("--paths means nothing with --chat.")
        if _WEIGHTS.value != "compute":
            raise UserError("--weights means nothing with --chat.")
        return _compare_replies(loaded)
    title = f"{loaded.config.name}, step {loaded.step}"
    record = _score(loaded)
    Console().print(evaluation_table(title, record))
    if _WEIGHTS.value == "int8":
        record["int8"] = rounded = _score(loaded._replace(params=layers.rounded(loaded.params)))
        Console().print(evaluation_table(f"{title}, int8 weights", rounded))
        cost, old = rounded["causal/nll"] - record["causal/nll"], record["causal/nll"]
        print(f"int8 weights cost {cost:+.5f} nats / token ({cost / old:+.3%}).")
    if _OUT.value:
        cli.write_out(_OUT.value, json.dumps({"step": loaded.step, **record}, indent=1) + "\n")


def _score(loaded: Loaded) -> dict[str, Any]:
    return score(
        loaded,
        tuple(_PATHS.value),
        text_key=_TEXT_KEY.value,
        rows=_ROWS.value,
        batch_size=_BATCH.value,
    )


def _compare_replies(loaded: Loaded) -> None:
    replies = answer(loaded, _CHAT.value, rows=_ROWS.value or 0, max_tokens=_MAX_TOKENS.value)
    record = replies.record()
    Console().print(
        f"{loaded.config.name}, step {loaded.step}: {record['exact']} of {record['replies']} replies are exact "
        f"({record['exact_share']:.1%}); {record['too_long']} conversations leave no room for a reply."
    )
    if _OUT.value:
        answers = [to_json(reply) for reply in replies.answers]
        cli.write_out(
            _OUT.value,
            json.dumps({"step": loaded.step, **record, "answers": answers}, indent=1) + "\n",
        )


if __name__ == "__main__":
    cli.run(main)
