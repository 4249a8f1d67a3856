"""The command line: what can be said, and help that teaches it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rlm_runtime.cli.codes import TABLE
from rlm_runtime.cli.values import number

TOP = """\
Recursive Language Models: the long text is a variable in a sandboxed Python REPL, a root model writes code
against it and asks sub-models about pieces, and the answer comes back when the root says it is ready.

examples:
  rlm ask "Who signed the contract?" --context contract.txt --root openai:gpt-5 --sub openai:gpt-5-mini
  rlm ask "Where is the retry logic?" --context src/ --root openai:qwen3 --base-url http://127.0.0.1:8000/v1
  rlm serve --root openai:gpt-5 --sub openai:gpt-5-mini     an OpenAI-compatible endpoint whose model is an RLM
  rlm view                                                  look at the runs in a browser
  rlm sandbox                                               what contains the model's code on this machine"""

ASK = """\
examples:
  rlm ask "How many orders failed?" --context orders.log --root openai:gpt-5-mini
  rlm ask "Compare the two reports" --context a.md b.md --root openai:gpt-5 --sub openai:gpt-5-mini
  cat big.txt | rlm ask "Summarise in five lines" --root openai:gpt-5 > summary.txt
  rlm ask "Extract all dates" -c letters/ --output-schema dates.json --json
  rlm ask "Deep question" -c corpus.txt --max-depth 2 --budget-usd 1 --set sub_calls=500 --set cell_seconds=60

Only the answer goes to standard output; progress, warnings and errors go to standard error.
Models can also come from the environment: RLM_ROOT, RLM_SUB; keys from OPENAI_API_KEY or ANTHROPIC_API_KEY.

--set takes any field of Budget (turns, sub_calls, input_tokens, output_tokens, usd, seconds, depth,
consecutive_errors), of Limits (cell_seconds, memory, scratch, output_chars, ...), and concurrency, compact_at,
window. Numbers may be written 8k, 10M, 2GiB; none takes a limit away.

--root-opt and --sub-opt take api_key_env (the variable that holds the endpoint's key), temperature, top_p, seed,
max_tokens, reasoning_effort, headers.NAME, query.NAME, extra_body.NAME, stream, timeout, concurrency, max_retries,
requests_per_minute, ... A key goes only to the endpoint it was given for: --sub-base-url needs a key of its own."""

SERVE = """\
examples:
  rlm serve --root openai:gpt-5 --sub openai:gpt-5-mini --budget-usd 1 --log runs/
  rlm serve --model fast=openai:gpt-5-mini --model deep=openai:gpt-5,openai:gpt-5-mini
  rlm serve --root openai:qwen3 --base-url http://127.0.0.1:8000/v1 --host 0.0.0.0 --api-key-file keys.txt

Then, with any OpenAI client: base_url="http://127.0.0.1:8080/v1", model="rlm".
Clients may lower the limits by {"rlm": {"budget": {"seconds": 60}, "max_depth": 1}}, never raise them.
Keys of clients: one a line in --api-key-file, or RLM_API_KEYS (comma-separated). Without any, only loopback
addresses are served. SIGTERM lets running requests finish (--drain-seconds), then exits with 0."""

VIEW = """\
examples:
  rlm view                                    every run of the default folder, live while they run
  rlm view runs/20260101-120000-ab12          one run
  rlm view runs/20260101-120000-ab12 --export run.html    one file that can be sent to somebody"""

REPLAY = """\
examples:
  rlm replay runs/20260101-120000-ab12

Runs the recorded cells again against the recorded replies of the models and compares what comes out. No model is
asked and nothing is spent. Exit code 0: equal; 1: something differs (the first differences are printed)."""

TASKS = """\
examples:
  rlm tasks                                             what there is
  rlm tasks s_niah --length 128k --seed 7 --out sample/   the context, question and answer of one sample"""

EVAL = """\
examples:
  rlm eval --task s_niah --lengths 8k,128k,1M --modes base,repl,rlm --root openai:gpt-5 --out eval/
  rlm eval --task oolong --lengths 32k --samples 20 --root openai:qwen3 --base-url http://127.0.0.1:8000/v1

Score, cost, calls and time by length, with confidence intervals, as a table, a CSV file and a plot. Run the same
command again and it goes on where it stopped."""

TRAINING = """\
examples:
  rlm training make --tasks s_niah,verbatim --samples 200 --seed 1 --split train --out train.jsonl
  rlm training drill --samples 12000 --out drill.jsonl
  rlm training filter runs/ --out runs.jsonl

All write chat JSONL that launch.train reads (data.format=chat)."""

MAKE = """\
examples:
  rlm training make --tasks all --samples 1000 --seed 1 --split train --out train.jsonl
  rlm training make --tasks all --samples 100 --seed 1 --split heldout --out heldout.jsonl

Expert programs lead real runs of the runtime; runs that do not score 1 are dropped and counted. The two splits share no
word, phrasing, label family or seed. The same command writes the same file."""

DRILL = """\
examples:
  rlm training drill --samples 12000 --seed 1 --out drill.jsonl

Random strings and their pieces in another order. A small model that begins with them copies what it has never seen, as
a key has to be (docs/native.md)."""

FILTER = """\
examples:
  rlm training filter runs/ --out runs.jsonl
  rlm training filter runs/ --scores eval/ --limit 20k --subs --out runs.jsonl

Drops runs with score 0 and of one turn, makes a sample of each turn, rewrites FINAL(...) to the runtime's own form, drops
samples over the limit. Scores come from the results of rlm eval; a run without one counts by whether it answered."""


USAGE = {
    "ask": "QUESTION [--context PATH ...] --root MODEL [--sub MODEL] [options]",
    "serve": "--root MODEL [--sub MODEL] [--model NAME=ROOT[,SUB] ...] [options]",
    "view": "[FILE|DIR] [--export FILE.html] [options]",
    "replay": "FILE|DIR [--context PATH] [options]",
    "eval": "--task TASK [--lengths N,N] [--modes M,M] --root MODEL [options]",
    "tasks": "[NAME] [--length N] [--seed N] [--out DIR]",
    "training": "make|drill|filter ...",
    "training make": "--tasks TASK,TASK --samples N --out FILE [options]",
    "training drill": "--samples N --out FILE [options]",
    "training filter": "RUN|DIR ... --out FILE [options]",
    "sandbox": "[--environment NAME] [--allow-missing LAYER] [--json]",
}


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"max_help_position": 32, **kwargs})


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="rlm", description=TOP, epilog=TABLE, formatter_class=_Help)
    top.add_argument("--version", action="store_true", help="print the version and end")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _ask(_add(commands, "ask", "answer a question about a text of any length", ASK))
    _serve(_add(commands, "serve", "serve RLMs behind an OpenAI-compatible endpoint", SERVE))
    _view(_add(commands, "view", "look at runs in a browser", VIEW))
    _replay(_add(commands, "replay", "run a recorded run's cells again and compare", REPLAY))
    _eval(_add(commands, "eval", "measure score, cost and time by length", EVAL))
    _tasks(_add(commands, "tasks", "list long-context tasks, or write a sample", TASKS))
    _training(
        _add(
            commands,
            "training",
            "make training data from expert programs or recorded runs",
            TRAINING,
        )
    )
    sandbox = _add(commands, "sandbox", "try which layers of the sandbox work here", "")
    sandbox.add_argument(
        "--environment", choices=ENVIRONMENTS, default="local", help="which REPL (default: local)"
    )
    _allow(sandbox)
    sandbox.add_argument("--json", action="store_true", help="as JSON")
    return top


def parsed(top: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; wrong ones end the process with the usage of their command."""
    args, unknown = top.parse_known_args(argv)
    if unknown:
        getattr(args, "parser", top).error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _allow(group: Any) -> None:
    text = "go on without this layer of the sandbox, e.g. landlock (see rlm sandbox)"
    group.add_argument("--allow-missing", metavar="LAYER", action="append", default=[], help=text)


ENVIRONMENTS = ("local", "bubblewrap", "docker", "unconfined")


def _add(
    commands: Any, name: str, text: str, epilog: str, under: str = ""
) -> argparse.ArgumentParser:
    epilog = f"{epilog}\n\n{TABLE}" if epilog else TABLE
    usage = f"rlm {under}{name} {USAGE[under + name]}\n       rlm {under}{name} --help lists the options"
    p: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=usage,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=epilog,
        formatter_class=_Help,
    )
    p.set_defaults(parser=p)
    return p


def _models(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("models")
    group.add_argument(
        "--root",
        metavar="MODEL",
        help="the model that writes the code, such as openai:gpt-5 (or RLM_ROOT)",
    )
    group.add_argument(
        "--sub",
        metavar="MODEL",
        help="the model that reads the pieces (RLM_SUB; default: the root)",
    )
    group.add_argument(
        "--base-url", metavar="URL", help="the root's endpoint, up to /v1 (or OPENAI_BASE_URL)"
    )
    group.add_argument(
        "--sub-base-url",
        metavar="URL",
        help="the sub-model's endpoint (default: the root's, for a model of the same provider)",
    )
    for name, whose in (("--root-opt", "root"), ("--sub-opt", "sub-model")):
        text = f"an option of the {whose}: temperature=0.2, api_key_env=MY_KEY, query.api-version=2024-10-21 (below)"
        group.add_argument(name, metavar="NAME=VALUE", action="append", default=[], help=text)
    group.add_argument(
        "--models",
        metavar="FILE.toml",
        help="models with options under names of your own (RLM_MODELS)",
    )
    group.add_argument(
        "--price", metavar="IN,OUT", help="dollars a million tokens, where the price table has none"
    )
    group.add_argument(
        "--sub-price", metavar="IN,OUT", help="the same of the sub-model (default: --price)"
    )
    group.add_argument(
        "--window",
        metavar="TOKENS",
        type=_count,
        help="the models' context window, if it is not known",
    )
    group.add_argument(
        "--timeout", metavar="S", type=_positive, help="seconds one model call may take"
    )


def _run(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("limits and settings of a run")
    group.add_argument(
        "--max-depth",
        metavar="N",
        type=int,
        default=1,
        help="0: no sub-calls, 1: plain sub-calls, 2: child RLMs, ... (1)",
    )
    group.add_argument(
        "--budget-usd", metavar="X", type=_positive, help="dollars, over the whole tree of calls"
    )
    group.add_argument("--budget-seconds", metavar="S", type=_positive, help="wall time")
    group.add_argument("--budget-turns", metavar="N", type=_count, help="turns of the root (30)")
    group.add_argument(
        "--budget-calls", metavar="N", type=_whole, help="sub-calls, over the whole tree"
    )
    group.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="any other limit (below)"
    )
    group.add_argument(
        "--tools",
        metavar="FILE.py",
        action="append",
        default=[],
        help="functions of this file, for the REPL; they run in this process, unconfined",
    )
    group.add_argument(
        "--system-prompt", metavar="FILE", help="instead of the built-in system prompt"
    )
    group.add_argument(
        "--prompt-variant",
        metavar="NAME",
        help="which built-in prompt: default, small, qwen-coder, native (for models trained on rlm training data)",
    )
    group.add_argument(
        "--tips",
        metavar="FILE",
        help="advice on contexts of this kind, for the root; apart from the system prompt",
    )
    group.add_argument(
        "--packages",
        metavar="NAME,NAME",
        action="append",
        default=[],
        help="installed packages that the code may import, such as numpy,pandas",
    )
    group.add_argument(
        "--environment", choices=ENVIRONMENTS, default="local", help="where the code runs (local)"
    )
    _allow(group)


def _files(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("how files are read")
    group.add_argument(
        "--encoding",
        metavar="NAME",
        help="of the file; in a folder, of the files that are not UTF-8 (left out without)",
    )
    group.add_argument(
        "--include",
        metavar="PATTERN",
        action="append",
        default=[],
        help="of a folder only these files: '*.py', 'docs/**'",
    )
    group.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[], help="of a folder not these"
    )
    group.add_argument(
        "--no-gitignore",
        action="store_true",
        help="of a folder also what its .gitignore files leave out",
    )


def _ask(p: argparse.ArgumentParser) -> None:
    p.add_argument("question", help="what you want to know")
    p.add_argument(
        "-c",
        "--context",
        metavar="PATH",
        nargs="+",
        action="extend",
        help="files or a folder; - is standard input, which is read by itself when piped",
    )
    _files(p)
    _models(p)
    _run(p)
    out = p.add_argument_group("output")
    out.add_argument("--output-schema", metavar="FILE", help="JSON schema the answer must satisfy")
    out.add_argument(
        "--json",
        action="store_true",
        help="the whole result as JSON: answer, usage, cost, turns, ...",
    )
    out.add_argument(
        "--log",
        metavar="DIR",
        help="folder of trajectories (RLM_LOG; default: ~/.local/state/rlm/runs)",
    )
    out.add_argument("--no-log", action="store_true", help="keep no trajectory")
    out.add_argument(
        "--plain", action="store_true", help="progress as plain lines, also on a terminal"
    )
    out.add_argument("-q", "--quiet", action="store_true", help="no progress")


def _serve(p: argparse.ArgumentParser) -> None:
    _models(p)
    p.add_argument("--name", default="rlm", help="what clients call the model of --root (rlm)")
    p.add_argument(
        "--model", metavar="NAME=ROOT[,SUB]", action="append", default=[], help="serve several RLMs"
    )
    _run(p)
    net = p.add_argument_group("network")
    net.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    net.add_argument("--port", type=_whole, default=8080, help="port; 0 takes a free one (8080)")
    net.add_argument("--api-key-file", metavar="FILE", help="keys of clients, one a line")
    net.add_argument(
        "--allow-no-key",
        action="store_true",
        help="serve other than loopback addresses without keys",
    )
    net.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a name the Host header may carry",
    )
    net.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="web pages that may call (none)",
    )
    bounds = p.add_argument_group("bounds")
    bounds.add_argument("--max-runs", type=_count, metavar="N", default=4, help="runs at once (4)")
    bounds.add_argument(
        "--max-queue",
        type=_whole,
        metavar="N",
        default=16,
        help="requests that may wait; more get 429 (16)",
    )
    bounds.add_argument(
        "--drain-seconds",
        type=float,
        metavar="S",
        default=30.0,
        help="what running requests may take after SIGTERM (30)",
    )
    bounds.add_argument(
        "--body-limit",
        type=_count,
        metavar="BYTES",
        default=64 << 20,
        help="of a JSON request (64MiB)",
    )
    bounds.add_argument(
        "--file-limit",
        type=_count,
        metavar="BYTES",
        default=2 << 30,
        help="of an uploaded file (2GiB)",
    )
    bounds.add_argument(
        "--files-limit",
        type=_count,
        metavar="BYTES",
        default=16 << 30,
        help="of all uploaded files (16GiB)",
    )
    bounds.add_argument(
        "--files-dir",
        metavar="DIR",
        help="keep uploads here over restarts (default: a temporary folder)",
    )
    bounds.add_argument(
        "--file-days",
        type=_positive,
        metavar="DAYS",
        default=7.0,
        help="until an upload is removed (7)",
    )
    p.add_argument(
        "--progress",
        choices=("field", "reasoning", "comment", "none"),
        default="field",
        help="how streams show progress (field)",
    )
    p.add_argument(
        "--log",
        metavar="DIR",
        help="keep trajectories here; their id is in the X-RLM-Run header (RLM_LOG)",
    )


def _view(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "path",
        nargs="?",
        metavar="FILE|DIR",
        help="a run, or a folder of runs (default: RLM_LOG or ~/.local/state/rlm/runs)",
    )
    p.add_argument("--export", metavar="FILE.html", help="write one HTML file instead of serving")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    p.add_argument("--port", type=_whole, default=8765, help="port; 0 takes a free one (8765)")
    p.add_argument("--no-browser", action="store_true", help="do not open a browser")


def _replay(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="FILE|DIR", help="a run's folder or its events.jsonl")
    p.add_argument("--context", metavar="PATH", help="the run's context, if it has been moved")
    p.add_argument(
        "--ignore",
        action="append",
        default=[],
        choices=("addresses", "numbers"),
        help="differences that are none: memory addresses; digits, as of clocks",
    )
    p.add_argument(
        "--environment", choices=ENVIRONMENTS, default="local", help="where the code runs (local)"
    )
    p.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a limit of the REPL; the recorded ones may only be lower (cell_seconds, memory, scratch, ...)",
    )
    p.add_argument("--json", action="store_true", help="the comparison as JSON")


def _eval(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--task",
        metavar="NAME",
        action="append",
        required=True,
        help="see rlm tasks; may be given again",
    )
    p.add_argument(
        "--lengths", metavar="N,N", default="8k,32k,128k", help="tokens, such as 8k,128k,1M,10M"
    )
    p.add_argument(
        "--modes",
        metavar="M,M",
        default="base,repl,rlm",
        help="base: the model alone; repl: no sub-calls; rlm; rlm+tips: with the task's tips, or --tips",
    )
    p.add_argument(
        "--samples", metavar="N", type=_count, default=10, help="of each task and length (10)"
    )
    p.add_argument("--seed", metavar="N", type=int, default=42, help="of the samples (42)")
    p.add_argument("--concurrency", metavar="N", type=_count, default=4, help="runs at once (4)")
    p.add_argument(
        "--out", metavar="DIR", default="rlm-eval", help="results, table and plot (rlm-eval)"
    )
    p.add_argument("--log", metavar="DIR", help="keep the trajectories here")
    _models(p)
    _run(p)


def _tasks(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", nargs="?", help="the task")
    p.add_argument("--length", metavar="N", default="8k", help="tokens (8k)")
    p.add_argument("--seed", metavar="N", type=int, default=42, help="of the sample (42)")
    p.add_argument(
        "--out",
        metavar="DIR",
        help="write context, question and answer here (default: standard output)",
    )


def _training(p: argparse.ArgumentParser) -> None:
    actions = p.add_subparsers(dest="action", metavar="ACTION", title="actions")
    make = _add(
        actions, "make", "run expert programs and write their conversations", MAKE, "training "
    )
    make.add_argument(
        "--tasks",
        metavar="TASK,TASK",
        required=True,
        help="tasks with an expert (see rlm tasks), or all",
    )
    make.add_argument(
        "--samples",
        metavar="N",
        type=_count,
        default=200,
        help="expert runs, over the tasks in turn (200)",
    )
    make.add_argument(
        "--seed", metavar="N", type=_whole, default=0, help="of texts, phrasings and strategies (0)"
    )
    make.add_argument(
        "--split",
        choices=("train", "heldout"),
        default="train",
        help="which words and phrasings (train)",
    )
    make.add_argument(
        "--lengths", metavar="N,N", default="2k,4k,8k", help="tokens of the contexts (2k,4k,8k)"
    )
    make.add_argument(
        "--window",
        metavar="TOKENS",
        type=_count,
        default=1024,
        help="of the model to be trained (1024)",
    )
    make.add_argument(
        "--prompt-variant",
        metavar="NAME",
        default="native",
        help="the words of the runtime (native)",
    )
    make.add_argument(
        "--strategies",
        metavar="NAME,NAME",
        default="",
        help="of the experts (default: all they have)",
    )
    make.add_argument(
        "--readings",
        metavar="X",
        type=float,
        default=0.5,
        help="sub-model samples for each run (0.5)",
    )
    make.add_argument(
        "--copies",
        metavar="X",
        type=float,
        default=0.0,
        help="exercises in copying for each run (0)",
    )
    make.add_argument("--concurrency", metavar="N", type=_count, default=4, help="runs at once (4)")
    make.add_argument(
        "--tokenizer", metavar="FILE", help="also write a tokenizer.json made for these samples"
    )
    make.add_argument("--out", metavar="FILE", required=True, help="chat JSONL to write")
    drills = _add(actions, "drill", "exercises with which copying begins", DRILL, "training ")
    drills.add_argument(
        "--samples", metavar="N", type=_count, default=12_000, help="exercises (12000)"
    )
    drills.add_argument("--seed", metavar="N", type=_whole, default=0, help="of the strings (0)")
    drills.add_argument("--split", choices=("train", "heldout"), default="train", help="(train)")
    drills.add_argument("--out", metavar="FILE", required=True, help="chat JSONL to write")
    filters = _add(actions, "filter", "recorded runs as samples, one a turn", FILTER, "training ")
    filters.add_argument("runs", metavar="RUN|DIR", nargs="+", help="runs, or folders of runs")
    filters.add_argument(
        "--scores", metavar="DIR|FILE", help="results of rlm eval (default: those beside the runs)"
    )
    filters.add_argument(
        "--limit",
        metavar="CHARS",
        type=_count,
        default=100_000,
        help="characters of a sample (100k)",
    )
    filters.add_argument(
        "--subs", action="store_true", help="the sub-calls of the runs as samples, too"
    )
    filters.add_argument("--out", metavar="FILE", required=True, help="chat JSONL to write")


def _positive(text: str) -> float:
    return _checked(text, lambda v: v > 0, "more than 0")


def _count(text: str) -> int:
    return int(_checked(text, lambda v: v >= 1 and v == int(v), "a whole number, 1 or more"))


def _whole(text: str) -> int:
    return int(_checked(text, lambda v: v >= 0 and v == int(v), "a whole number, 0 or more"))


def _checked(text: str, fits: Any, what: str) -> float:
    try:
        value = number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}") from None
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text}: expected {what}")
    return value
