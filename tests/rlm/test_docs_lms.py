"""Every snippet and command of docs/lms.md runs as printed, against a model server on this
machine."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

from rlm.fake_server import FakeServer
from rlm.test_docs import place, reply, run  # noqa: F401 - a fixture
from rlm.test_rlm_outside import SERVER
from rlm_runtime.lms import options_of
from rlm_runtime.lms.openai import OpenAILM

PAGE = (Path(__file__).parents[2] / "docs" / "lms.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]
(MODELS,) = [code for language, code in BLOCKS if language == "toml"]

# The one function of litellm that the page uses, with its documented shape, where the package is
# not installed.
LITELLM = """
class ModelResponse:
    def __init__(self, text):
        self.text = text

    def model_dump(self):
        choice = {"message": {"role": "assistant", "content": self.text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 900, "completion_tokens": 20, "total_tokens": 920}
        return {"model": "gemini-2.5-flash", "choices": [choice], "usage": usage}


async def acompletion(model, messages, **options):
    assert model == "gemini/gemini-2.5-flash" and messages[0]["role"] == "system"
    return ModelResponse("```repl\\nanswer['content'] = 'An answer.'\\nanswer['ready'] = True\\n```")
"""


@pytest.fixture(scope="module")
def server():
    with FakeServer(reply) as server:
        yield server


@pytest.fixture
def here(place):  # noqa: F811
    (place.home / "models.toml").write_text(MODELS)
    (place.home / "server.py").write_text(SERVER)
    python = place.home / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    if importlib.util.find_spec("litellm") is None:
        (place.home / "litellm.py").write_text(LITELLM)
    return place


def test_the_page_has_snippets():
    assert len(PYTHON) >= 8 and len(SHELL) >= 2


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(here, code):
    if "litellm" in code and importlib.util.find_spec("litellm") is not None:
        code = code.replace("**options)", "mock_response='```repl\\nFINAL(1)\\n```', **options)")
    assert run(here, [sys.executable, "-W", "error::ResourceWarning", "-c", code]).strip()


@pytest.mark.parametrize("code", SHELL)
def test_shell(here, code):
    assert run(here, ["bash", "-euo", "pipefail"], code).strip()


def test_litellm_takes_as_few_lines_as_the_heading_says():
    (code,) = [c for c in PYTHON if "litellm" in c]
    lines = int(re.search(r"LiteLLM in (\d+) lines", PAGE)[1])
    assert len([line for line in code.splitlines() if line.strip()]) <= lines


def test_every_option_of_an_endpoint_is_on_the_page():
    table = PAGE[PAGE.index("| option |") : PAGE.index("Models with many options")]
    for name in options_of(OpenAILM) - {"provider"}:
        assert f"`{name}`" in table, name


def test_what_the_page_says_is_in_a_class_is():
    from rlm_runtime.lms.chat import ChatLM

    for name in ("body", "read", "adapt"):
        assert f"`{name}`" in PAGE and inspect.isfunction(getattr(ChatLM, name))
