"""Load on a server that speaks OpenAI's completions: how fast, how soon, how many good.

    python -m launch.serve runs/mor --lanes 16 &
    python -m launch.bench_serve --model mor --requests 200 --concurrency 32 --out load.json
    python -m launch.bench_serve --model mor --prefix 512 --prompt 32 --output 16 --concurrency 32
    python -m launch.bench_serve --url http://127.0.0.1:9000/v1 --model other --rate 4

First a closed loop (so many clients, each with one request under way), then Poisson arrivals at shares of the rate it
reached; with --rate only arrivals at that rate. Lengths are in words; with --vocab in tokens, sent as ids.
"""

import asyncio
import json
import sys

from absl import flags

from launch import cli
from mor_jax.errors import UserError
from rlm_runtime.errors import UsageError
from rlm_runtime.serve.access import read_keys
from rlm_runtime.serve.load import Plan, Workload, measure

_URL = flags.DEFINE_string("url", "http://127.0.0.1:8000/v1", "The server, up to /v1.")
_MODEL = flags.DEFINE_string("model", None, "Name of the model there.", required=True)
_KEYS = flags.DEFINE_string("api_key_file", None, "A file whose first line is the API key.")
_REQUESTS = flags.DEFINE_integer("requests", 64, "Requests of each round.", lower_bound=1)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Clients of the closed loop.", lower_bound=1)
_LOADS = flags.DEFINE_list("loads", ["0.5", "0.8", "0.95"], "Shares of the closed loop's rate; empty: none.")
_RATE = flags.DEFINE_float("rate", 0.0, "Requests a second, instead of the closed loop and its shares.", lower_bound=0)
_PROMPT = flags.DEFINE_integer("prompt", 64, "Words of a prompt that are its own.", lower_bound=0)
_PREFIX = flags.DEFINE_integer("prefix", 0, "Words that all prompts begin with.", lower_bound=0)
_OUTPUT = flags.DEFINE_integer("output", 64, "Tokens to generate.", lower_bound=1)
_VOCAB = flags.DEFINE_integer("vocab", 0, "Send random token ids below this instead of words.", lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_SEED = flags.DEFINE_integer("seed", 0, "Of prompts and arrivals.")
_TTFT = flags.DEFINE_float("goal_ttft", 1.0, "A good request has its first token within so many seconds ...")
_GAP = flags.DEFINE_float("goal_token", 0.1, "... and then one in so many, on average.")
_TIMEOUT = flags.DEFINE_float("timeout", 600.0, "Seconds a request may take.")
_OUT = flags.DEFINE_string("out", None, "Where the figures go, as JSON.")


def main(_: list[str]) -> None:
    try:
        loads = tuple(float(x) for x in _LOADS.value if x)
        key = read_keys(_KEYS.value, "--api_key_file")[0] if _KEYS.value else ""
        workload = Workload(
            _MODEL.value, prompt=_PROMPT.value, prefix=_PREFIX.value, output=_OUTPUT.value, vocab=_VOCAB.value,
            temperature=_TEMPERATURE.value, seed=_SEED.value,
        )  # fmt: skip
        plan = Plan(
            _URL.value, workload, requests=_REQUESTS.value, concurrency=_CONCURRENCY.value, loads=loads,
            rate=_RATE.value, goal_ttft=_TTFT.value, goal_gap=_GAP.value, timeout=_TIMEOUT.value, key=key,
        )  # fmt: skip
        found = asyncio.run(measure(plan, say=lambda text: print(text, file=sys.stderr, flush=True)))
    except (UsageError, ValueError) as e:
        raise UserError(str(e)) from e
    text = json.dumps(found, indent=1)
    if _OUT.value:
        cli.write_out(_OUT.value, text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    cli.run(main)
