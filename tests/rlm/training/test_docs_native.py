"""Every snippet and command of docs/native.md runs as printed; wrong usage of `rlm training` is one
clear message."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlm.fake_environment import FakeEnvironment
from rlm.loop_helpers import cell, done, echo
from rlm.test_cli import Command
from rlm_runtime import RLM
from rlm_runtime.lms.scripted import ScriptedLM

PAGE = Path(__file__).parents[3] / "docs" / "native.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
COMMANDS = [
    line
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip()
]


def rlm(place, *args):
    return subprocess.run(
        [sys.executable, "-m", "rlm_runtime", *args],
        cwd=place.home,
        env=place.env(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def place(tmp_path):
    root = ScriptedLM([cell("print(1)"), done("1")])
    RLM(root, echo(), log_dir=tmp_path / "runs", environment=FakeEnvironment).completion(
        "text", "What?"
    )
    return Command(tmp_path)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python(place, code):
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=place.home, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == 0 and out.stdout.strip() == "noon", out.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(place, command):
    assert command.startswith("rlm training ")
    out = rlm(place, *command.split()[1:])
    assert out.returncode == 0, out.stderr
    records = [
        json.loads(line) for line in (place.home / out.stdout.strip()).read_text().splitlines()
    ]
    assert records and all(set(r) == {"messages", "provenance"} for r in records)
    assert "samples" in out.stderr or "with score 1" in out.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["make", "--tasks", "s_nih", "--out", "x"],
            "task 's_nih' is unknown. There are experts for: absent, codeqa",
        ),
        (
            ["make", "--tasks", "s_niah", "--window", "100", "--out", "x"],
            "its window of 100 tokens is too small",
        ),
        (
            ["make", "--tasks", "s_niah", "--lengths", "5", "--out", "x"],
            "a length of 20 tokens is too short",
        ),
        (
            ["make", "--tasks", "s_niah", "--strategies", "fly", "--out", "x"],
            "has none of the strategies fly; it has extract",
        ),
        (
            ["filter", "nowhere", "--out", "x"],
            "No run at nowhere: expected a run folder with events.jsonl",
        ),
        ([], "rlm training make|drill|filter"),
    ],
)
def test_wrong_usage_is_one_clear_message(place, args, says):
    out = rlm(place, "training", *args)
    assert out.returncode != 0 and says in out.stderr + out.stdout and "Traceback" not in out.stderr
    assert not (place.home / "x").exists()
