"""The README's example, as printed: ten million tokens, one needle, and a root that writes code to
find it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rlm.fake_server import FakeServer
from rlm.test_cli import Command

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Ten million tokens")[1].split("\n## ")[0]
COMMANDS = re.search(r"```bash\n(.*?)```", SECTION, re.S)[1].replace("\\\n", " ")
SNIPPET = re.search(r"```python\n(.*?)```", SECTION, re.S)[1]
PROSE = [
    (
        "tide",
        "The harbour master wrote that the tide of the ninth was the highest in living memory. ",
        "tide of the ninth",
    ),
    (
        "mill",
        "Nobody in the village knew who had sold the mill, only that the new owner never slept. ",
        "the new owner",
    ),
    (
        "coat",
        "He kept the letters in the lining of a coat that had been turned twice already. ",
        "lining of a coat",
    ),
]


def root(body: dict) -> str:
    """What a model that knows the protocol would do: look, search by code, verify, answer."""
    messages = [m["content"] for m in body["messages"]]
    asked = "".join(messages)
    if body["model"] == "gpt-5-mini":
        return "a sub-model's opinion"
    if len(messages) == 2:
        return "First a look.\n```repl\nprint(type(context).__name__, len(context))\n```"
    if "nimble-porch" in asked:
        find = 'import re\nhits = re.findall(r"nimble-porch is: (\\d+)", context)'
    else:
        find = 'hits = [name for name in context if "the new owner" in context[name]]'
    if len(messages) == 4:
        return f"```repl\n{find}\nprint(hits)\n```"
    return (
        '```repl\nassert len(hits) == 1\nanswer["content"] = hits[0]; answer["ready"] = True\n```'
    )


@pytest.fixture
def place(tmp_path):
    with FakeServer(root) as server:
        command = Command(tmp_path)
        command.environment = command.env(OPENAI_BASE_URL=server.url, OPENAI_API_KEY="key")
        yield command


def run(place, *argv):
    done = subprocess.run(
        argv, cwd=place.home, env=place.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_needle_in_ten_million_tokens_is_found(place):
    lines = {
        line.split()[1]: line.split("  #")[0]
        for line in COMMANDS.splitlines()
        if line.startswith("rlm ")
    }
    assert set(lines) == {"tasks", "ask", "view"}
    cli = (sys.executable, "-m", "rlm_runtime")
    run(place, *cli, *shlex.split(lines["tasks"])[1:])
    example = json.loads((place.home / "sample" / "example.json").read_text())
    text = place.home / example["context"]
    assert (
        text.stat().st_size > 39_000_000
        and example["context"] in lines["ask"]
        and example["context"] in SNIPPET
    )
    (needle,) = example["answer"]
    assert run(place, *cli, *shlex.split(lines["ask"])[1:]).strip() == needle
    printed = run(place, sys.executable, "-c", SNIPPET)
    assert printed.startswith(f"{needle} 3 turns ") and printed.strip().endswith("dollars")


def test_three_files_of_prose(place):
    for name, sentence, _ in PROSE:
        (place.home / f"{name}.txt").write_text((sentence + "\n") * 20_000)
    files = [f"{name}.txt" for name, _, _ in PROSE]
    argv = [
        "ask",
        "Which file speaks of the new owner?",
        "--context",
        *files,
        "--root",
        "openai:gpt-5",
    ]
    assert run(place, sys.executable, "-m", "rlm_runtime", *argv).strip() == "mill.txt"
