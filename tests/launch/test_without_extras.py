"""Every command where no optional package is installed: its help, and one clear line where it
cannot do without."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from train.tiny_run import ROOT, environment, run_forked

from launch.__main__ import commands

COMMANDS = list(commands())
RLM = ["", "ask", "serve", "view", "replay", "eval", "tasks", "sandbox"]
# A finder in front of all others, in a module that Python imports before anything else.
SITE = """
import sys
NAMES = {names!r}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def required(name, extra=""):
    """Names of the distributions that one needs, with those of an extra."""
    found = set()
    for text in importlib.metadata.requires(name) or ():
        requirement, _, marker = text.partition(";")
        wanted = re.search(r"""extra == ['"]([^'"]+)""", marker)
        if (wanted[1] if wanted else "") in ("", extra):
            found.add(re.split(r"[\[<>=!~ (]", requirement.strip())[0].lower().replace("_", "-"))
    return found


def closure(names):
    """All distributions that an installation of these brings."""
    seen, todo = set(), set(names)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            try:
                todo |= required(name)
            except importlib.metadata.PackageNotFoundError:
                continue
    return seen


def without_extras(directory, base):
    """The environment of a command that finds nothing but this set of distributions."""
    extras = importlib.metadata.metadata("mor-jax").get_all("Provides-Extra")
    optional = closure(set().union(*(required("mor-jax", extra) for extra in extras))) - base
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if {o.lower().replace("_", "-") for o in owners} <= optional and not module.startswith("_")
    }
    assert {"starlette", "uvicorn", "s3fs", "gcsfs"} <= modules
    (directory / "sitecustomize.py").write_text(SITE.format(names=modules))
    return modules, environment(PYTHONPATH=f"{directory}:{ROOT}")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """What `pip install "mor-jax[jax]"` brings."""
    base = closure(required("mor-jax") | required("mor-jax", "jax"))
    modules, env = without_extras(tmp_path_factory.mktemp("bare"), base)
    assert not modules & {"jax", "flax", "mor_jax", "numpy"}
    return env


@pytest.fixture(scope="module")
def runtime_only(tmp_path_factory):
    """What `pip install mor-jax` brings: no JAX."""
    modules, env = without_extras(tmp_path_factory.mktemp("runtime"), closure(required("mor-jax")))
    assert {"jax", "flax"} <= modules and not modules & {"mor_jax", "numpy"}
    return env


def call(bare, *arguments):
    package, _, name = arguments[0].partition(".")
    if package == "launch" and sys.platform == "linux":
        done = run_forked(name, arguments[1:], bare)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=bare,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )


def clear(done):
    """Either it worked, or the last thing it said is one line about what to do."""
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "ModuleNotFoundError" not in said, said
    return said


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_extra(bare, name):
    done = call(bare, f"launch.{name}", "--help")
    clear(done)
    assert done.returncode in (0, 1) and done.stdout.strip()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_call_is_no_traceback(bare, name):
    """With nothing on the command line: help, or one line."""
    done = call(bare, f"launch.{name}", *(["--workdir", "/dev/null/x"] if name == "demo" else []))
    said = clear(done)
    assert done.returncode in (0, 1, 2) and said.strip()


@pytest.mark.parametrize("name", RLM, ids=lambda name: name or "rlm")
def test_rlm_help_needs_no_extra(runtime_only, name):
    done = call(runtime_only, "rlm_runtime", *filter(None, [name]), "--help")
    clear(done)
    assert done.returncode == 0 and done.stdout.strip()


def test_rlm_serve_names_its_extra(runtime_only):
    done = call(runtime_only, "rlm_runtime", "serve")
    assert done.returncode == 2
    assert 'pip install ".[serve]"' in clear(done).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["launch.serve", "runs/none"], "serve"),
        (["launch.lm_eval", "--model", "mor"], "lm-eval"),
        (
            ["launch.train", "--config", "configs/quickstart.py", "--workdir", "gs://bucket/run"],
            "gcs",
        ),
        (
            ["launch.train", "--config", "configs/quickstart.py", "--workdir", "s3://bucket/run"],
            "s3",
        ),
        (["launch.evaluate", "--checkpoint", "s3://bucket/run"], "s3"),
        (["launch.report", "gs://bucket/run"], "gcs"),
        (
            ["launch.sweep", "configs/ablations/sharing.py:tiny", "--workdir", "gs://bucket/sweep"],
            "gcs",
        ),
        (
            [
                "launch.train",
                "--config",
                "configs/quickstart.py",
                "--workdir",
                "/tmp/never",
                "--config.data.source=files",
                "--config.data.paths=s3://bucket/*.jsonl",
            ],
            "s3",
        ),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else value,
)
def test_what_needs_an_extra_names_it(bare, arguments, extra):
    done = call(bare, *arguments)
    said = clear(done)
    assert done.returncode == 2
    assert f'pip install ".[{extra}]"' in said.strip().splitlines()[-1]
