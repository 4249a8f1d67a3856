"""Every snippet and command of docs/rlm.md runs as printed, against a model server on this
machine."""

import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest

from rlm.fake_server import FakeServer
from rlm.test_cli import Command, done, serving

PAGE = Path(__file__).parents[2] / "docs" / "rlm.md"
BLOCKS = re.findall(r"^```(\w+)( \w+)?\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
PYTHON = [code for language, kind, code in BLOCKS if language == "python" and not kind]
CLIENT = [code for language, kind, code in BLOCKS if language == "python" and kind]
SHELL = [code for language, _, code in BLOCKS if language == "bash"]
COMMANDS = [b for b in SHELL if "rlm serve" not in b]
SERVERS = [line for b in SHELL for line in b.splitlines() if line.startswith("rlm serve")]


def reply(body):
    # rlm eval
    if number := re.search(r"magic number for (\S+) mentioned", text := str(body["messages"])):
        if body["messages"][0]["role"] != "system":
            return re.search(rf"for {number[1]} is: (\d+)", text)[1]
        return done(f"context.split('for {number[1]} is: ')[1].split('.')[0]")
    text = body["messages"][-1]["content"]
    if "oldest person" in str(body["messages"]):
        return done("{'name': 'Ada', 'age': 90}")
    return (
        done("'An answer.'")
        if body["messages"][0]["role"] == "system"
        else f"An answer to {text[:20]}"
    )


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
    (tmp_path / "notes" / "drafts").mkdir()
    (tmp_path / "notes" / "drafts" / "wednesday.md").write_text("water")
    command = Command(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "rlm").write_text(f'#!/bin/sh\nexec {sys.executable} -m rlm_runtime "$@"\n')
    (tools / "rlm").chmod(0o755)
    # what it is told is held by the tests at the end
    (tools / "pip").write_text("#!/bin/sh\necho installed\n")
    (tools / "pip").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    command.environment = command.env(OPENAI_BASE_URL=server.url, PATH=path)
    return command


def run(place, command, text=None):
    done = subprocess.run(
        command,
        cwd=place.home,
        env=place.environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_of_the_page_is_run():
    assert len(PYTHON) >= 8 and len(COMMANDS) >= 5 and len(CLIENT) == 1 and len(SERVERS) >= 2
    text = PAGE.read_text(encoding="utf-8")
    fences = re.findall(r"^[ \t>]*(?:```|~~~)", text, re.M)
    # a command in an indented block
    assert not re.search(r"^(?: {4}|\t)(?:rlm|pip|python) [^=]", text, re.M)
    served = [line for b in SHELL if b not in COMMANDS for line in b.splitlines() if line]
    assert served == SERVERS  # such a block holds nothing else
    assert len(fences) == 2 * (len(PYTHON) + len(CLIENT) + len(SHELL))


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(place, code):
    out = run(place, [sys.executable, "-W", "error::ResourceWarning", "-c", code])
    assert out.strip() or "print" not in code


@pytest.mark.parametrize("code", COMMANDS, ids=range(len(COMMANDS)))
def test_shell(place, server, code):
    out = run(
        place, ["bash", "-euo", "pipefail"], code.replace("http://127.0.0.1:8000/v1", server.url)
    )
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


ROOT = PAGE.parents[1]
INSTALLS = {
    (path.relative_to(ROOT).as_posix(), line.strip())
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "benchmarks").glob("*.md")),
    )
    for line in re.findall(r"pip install [^`\n#;)]+", path.read_text(encoding="utf-8"))
}
# named as what they are: other projects, for comparison or beside ours
OTHERS = {"rlms dspy", '"lm-eval[api]"'}


def extras():
    """The extras that setup.py declares. Python 3.12 brings no setuptools, so a stand-in takes what
    it is told."""
    told = {}
    stand_in = types.ModuleType("setuptools")
    stand_in.find_packages = lambda **how: []
    stand_in.setup = told.update
    with mock.patch.dict(sys.modules, setuptools=stand_in):
        runpy.run_path(str(ROOT / "setup.py"))
    return set(told["extras_require"])


def test_no_command_installs_a_name_that_is_not_ours_from_an_index():
    assert len(INSTALLS) >= 4
    known = extras()
    for path, line in INSTALLS:
        what = line.removeprefix("pip install ").removeprefix("-e ").strip()
        if what in OTHERS:
            continue
        found = re.fullmatch(r"""\.|["']\.\[([\w,-]+)\]["']""", what)
        assert found, f"{path}: {line}"
        assert set(filter(None, (found[1] or "").split(","))) <= known, f"{path}: {line}"


def test_no_message_does_either():
    for folder in ("rlm_runtime", "mor_jax", "launch", "benchmarks", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "mor-jax[" not in text and "mor_jax[" not in text, path


def test_the_runtime_needs_no_jax(place):
    """Where nothing of the model library can be imported, a run, the list of tasks and the sandbox
    work all the same."""
    missing = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax",
        "grain",
        "ml_collections",
        "tensorflow_datasets",
        "array_record",
        "tokenizers",
        "absl",
        "numpy",
        "scipy",
        "yaml",
    )
    (place.home / "sitecustomize.py").write_text(
        f"import sys\nfor n in {missing}:\n    sys.modules[n] = None\n"
    )
    place.environment["PYTHONPATH"] = f"{place.home}{os.pathsep}{place.environment['PYTHONPATH']}"
    run(place, [sys.executable, "-c", "import sys; assert sys.modules['jax'] is None"])
    ask = "rlm ask 'Who?' -c book.txt --root openai:gpt-5-mini && rlm tasks s_niah --length 2k && rlm sandbox"
    assert run(place, ["bash", "-euo", "pipefail"], ask).startswith("An answer.")
    command = ["rlm", "ask", "q", "-c", "book.txt", "--root", "checkpoint:x"]
    failed = subprocess.run(
        command, cwd=place.home, env=place.environment, capture_output=True, text=True, timeout=60
    )
    assert failed.returncode == 2 and 'pip install ".[jax]"' in failed.stderr
