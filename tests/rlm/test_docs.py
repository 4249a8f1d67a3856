"""Every snippet and command of docs/rlm.md runs as printed, against a model server on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlm.fake_server import FakeServer
from rlm.test_cli import Command, done, serving

PAGE = Path(__file__).parents[2] / "docs" / "rlm.md"
BLOCKS = re.findall(r"^```(\w+)( \w+)?\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
PYTHON = [code for language, kind, code in BLOCKS if language == "python" and not kind]
CLIENT = [code for language, kind, code in BLOCKS if language == "python" and kind]
SHELL = [code for language, _, code in BLOCKS if language == "bash"]
COMMANDS = [b for b in SHELL if "rlm serve" not in b and "rlm eval" not in b]
SERVERS = [line for b in SHELL for line in b.splitlines() if line.startswith("rlm serve")]


def reply(body):
    text = body["messages"][-1]["content"]
    if "oldest person" in str(body["messages"]):
        return done("{'name': 'Ada', 'age': 90}")
    return done("'An answer.'") if body["messages"][0]["role"] == "system" else f"An answer to {text[:20]}"


@pytest.fixture(scope="module")
def server():
    with FakeServer(reply) as server:
        yield server


@pytest.fixture
def place(tmp_path, server):
    """What the page assumes to be there."""
    (tmp_path / "book.txt").write_text("A book. Ada is ninety.\n" * 200)
    (tmp_path / "old.txt").write_bytes("Äpfel und Öl".encode("latin-1"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "monday.md").write_text("tea")
    (tmp_path / "notes" / "tuesday.md").write_text("coffee")
    command = Command(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "rlm").write_text(f'#!/bin/sh\nexec {sys.executable} -m rlm_runtime "$@"\n')
    (tools / "rlm").chmod(0o755)
    (tools / "pip").write_text("#!/bin/sh\n")
    (tools / "pip").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    command.environment = command.env(OPENAI_BASE_URL=server.url, PATH=path)
    return command


def run(place, command, text=None):
    done = subprocess.run(
        command, cwd=place.home, env=place.environment, input=text, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_has_snippets():
    assert len(PYTHON) >= 8 and len(COMMANDS) >= 5 and len(CLIENT) == 1 and len(SERVERS) >= 2


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(place, code):
    out = run(place, [sys.executable, "-W", "error::ResourceWarning", "-c", code])
    assert out.strip() or "print" not in code


@pytest.mark.parametrize("code", COMMANDS, ids=range(len(COMMANDS)))
def test_shell(place, server, code):
    out = run(place, ["bash", "-euo", "pipefail"], code.replace("http://127.0.0.1:8000/v1", server.url))
    assert out.strip() or " > " in code


@pytest.mark.parametrize("line", SERVERS)
def test_servers_and_the_client(place, line):
    pytest.importorskip("openai", reason="openai is not installed (it is in the extra dev)")
    with serving(place, *line.split()[1:], "--port", "0", env=place.environment) as (url, _):
        if "--model" in line:
            return
        assert "8080" in CLIENT[0]
        out = run(place, [sys.executable, "-c", CLIENT[0].replace("http://127.0.0.1:8080/v1", url)])
        assert out.startswith("An answer.")
