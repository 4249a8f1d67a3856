"""What a machine has where only the wheel is: commands and configurations, from any folder,
whatever lies there."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from train.tiny_run import ROOT, environment

STEPS = "--config.train.steps=1e1"  # read as 10


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel unpacked into a folder, as pip does; its dependencies are those of this
    environment."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"  # a copy: a build leaves folders where it runs
    source.mkdir()
    for name in ("mor_jax", "rlm_runtime", "configs", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        directory,
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # without setuptools here, pip fetches it
        done = subprocess.run(
            [c for c in command if c != "--no-build-isolation"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    [built] = directory.glob("*.whl")
    zipfile.ZipFile(built).extractall(directory / "site")
    return directory / "site"


def call(wheel, folder, *arguments, module=True):
    """A command in `folder`; the checkout is on no path."""
    code = [sys.executable, "-m", *arguments] if module else [sys.executable, *arguments]
    env = environment(PYTHONPATH=str(wheel))
    return subprocess.run(code, capture_output=True, text=True, cwd=folder, env=env, timeout=600)


@pytest.fixture(scope="module")
def mor(wheel):
    """What the console script does, as a file."""
    script = wheel.parent / "mor"
    script.write_text("from launch.__main__ import main\n\nmain()\n")
    return script


def test_it_has_what_the_commands_read(wheel):
    for name in (
        "configs/mor.py",
        "configs/ablations/sharing.py",
        "launch/gke_jobset.yaml",
        "launch/tpu_vm.sh",
        "rlm_runtime/native/weights.npz",
    ):
        assert (wheel / name).is_file()
    [points] = wheel.glob("mor_jax-*.dist-info/entry_points.txt")
    assert "mor = launch.__main__:main" in points.read_text()
    assert {p.name for p in wheel.iterdir() if p.suffix != ".dist-info"} == {
        "mor_jax",
        "rlm_runtime",
        "configs",
        "launch",
    }


def test_configurations_are_found_from_an_empty_folder(wheel, tmp_path):
    done = call(wheel, tmp_path, "launch.inspect", "--config", "configs/mor.py:360m", "--json")
    assert done.returncode == 0, done.stderr
    done = call(
        wheel,
        tmp_path,
        "launch.sweep",
        "configs/ablations/sharing.py:tiny",
        "--workdir",
        "x",
        "--dry_run",
    )
    assert done.returncode == 0 and "seed0" in done.stdout, done.stderr
    done = call(
        wheel,
        tmp_path,
        "launch.plan",
        "configs/mor.py:360m,nr=3",
        "--topology",
        "v5e-8",
        "--suggest",
    )
    assert done.returncode == 0, done.stderr
    done = call(wheel, tmp_path, "launch.inspect", "--config", "configs/nothing.py")
    assert done.returncode == 2 and "nothing.py" in done.stderr and "Traceback" not in done.stderr


def test_packages_of_the_same_names_are_in_nobodys_way(wheel, mor, tmp_path):
    """The folder has packages `configs` and `launch`, with a configuration of its own that reads
    ours and theirs."""
    for name in ("configs", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise RuntimeError('the wrong one')\n" if name == "launch" else ""
        )
    (tmp_path / "configs" / "theirs.py").write_text("LAYERS = 2\n")
    (tmp_path / "configs" / "own.py").write_text(
        "from configs import quickstart, theirs\n\n\ndef get_config(arg=''):\n"
        "    config = quickstart.get_config('vanilla')\n    config.model.layers = theirs.LAYERS\n    return config\n"
    )
    done = call(wheel, tmp_path, mor, "inspect", "--config", "configs/mor.py:360m", module=False)
    assert done.returncode == 0, done.stderr
    done = call(wheel, tmp_path, mor, "inspect", "--config", "configs/own.py", module=False)
    # its two layers
    assert done.returncode == 0 and "[0 1]" in done.stdout, done.stdout + done.stderr
    done = call(
        wheel,
        tmp_path,
        mor,
        "sweep",
        "configs/ablations/sharing.py:tiny",
        "--workdir",
        "x",
        "--dry_run",
        module=False,
    )
    assert done.returncode == 0, done.stderr


def test_train_evaluate_generate_report(wheel, mor, tmp_path):
    """The steps of the demonstration, a few steps of training each, in a folder that has
    nothing."""
    text = tmp_path / "text.txt"
    text.write_text("def depth(step):\n    return step + 1\n" * 200)
    small = [
        f"--config.data.paths={text}",
        "--config.data.source=files",
        "--config.train.batch_size=2",
        STEPS,
        "--config.model.context=32",
        "--config.data.tokenizer=bytes",
        "--config.model.layers=1",
        "--config.model.width=16",
        "--config.model.heads=2",
        "--config.model.kv_heads=1",
        "--config.model.mlp_width=32",
        "--config.train.eval_every=0",
        "--config.train.checkpoint_every=0",
    ]
    done = call(
        wheel,
        tmp_path,
        "launch.train",
        "--config",
        "configs/quickstart.py:vanilla",
        "--workdir",
        "run",
        *small,
    )
    assert done.returncode == 0, done.stderr
    done = call(
        wheel,
        tmp_path,
        mor,
        "evaluate",
        "--checkpoint",
        "run",
        "--out",
        "record.json",
        module=False,
    )
    assert done.returncode == 0 and (tmp_path / "record.json").exists(), done.stderr
    done = call(
        wheel,
        tmp_path,
        mor,
        "generate",
        "--checkpoint",
        "run",
        "--prompt",
        "def",
        "--max_tokens",
        "3",
        module=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("def"), done.stderr
    done = call(wheel, tmp_path, "launch.report", "run", "--out", "report.html")
    assert done.returncode == 0 and (tmp_path / "report.html").exists(), done.stderr


def test_mor_lists_its_commands(wheel, mor, tmp_path):
    done = call(wheel, tmp_path, mor, module=False)
    assert done.returncode == 0 and "generate" in done.stdout and "train" in done.stdout
    done = call(wheel, tmp_path, mor, "trian", module=False)
    assert (
        done.returncode == 2
        and "Did you mean train?" in done.stderr
        and "Traceback" not in done.stderr
    )
