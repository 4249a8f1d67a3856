"""A person's mistake is one line that names it, exit status 2 and no traceback: through the real
commands."""

import concurrent.futures
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from train.tiny_run import Trained, records, run, write_config, write_corpus

from mor_jax.data.tokenizer import train_bpe
from mor_jax.train.checkpoint import load_meta
from mor_jax.train.load import load_model


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained):
    """Broken corpora, a foreign tokenizer, a damaged run."""
    d = tmp_path_factory.mktemp("bad")
    good = write_corpus(d)
    (d / "garbage.txt.gz").write_bytes(np.random.default_rng(0).bytes(500))
    (d / "empty.txt").write_text("")
    (d / "blank.jsonl").write_text('{"text": ""}\n\n')
    (d / "latin.txt").write_bytes("déjà".encode("latin1"))
    (d / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (d / "locked.txt").write_text("secret")
    (d / "locked.txt").chmod(0)
    train_bpe(["def step loss value return depth " * 20], 300).save(d / "bpe300")
    train_bpe([" ".join(f"word{i}" for i in range(400))], 400).save(d / "bpe400")
    damaged = d / "damaged"
    shutil.copytree(trained.mor, damaged)
    flip_bytes(damaged / "checkpoints" / "120")
    (d / "no_run").mkdir()
    return d, write_config(d, good)


def flip_bytes(step):
    """Damage the arrays of one checkpoint, leaving names and sizes."""
    files = [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        data = bytearray(path.read_bytes())
        for i in range(len(data) // 3, len(data) * 2 // 3):
            data[i] ^= 0xFF
        path.write_bytes(data)


def cases(d, config, trained):
    """name: (command and arguments, environment or input, what the message must contain)"""

    count = itertools.count()

    def train(*args):  # a run directory each: one of them at a time has the lock
        return ("train", "--config", config, "--workdir", d / f"never{next(count)}", *args)

    def corpus(name):
        return train(f"--config.data.paths=('{d / name}',)")

    def generate(*args):
        return ("generate", "--checkpoint", trained.mor, *args)

    found = {
        "misspelt key": (train("--config.model.layrs=3"), {}, ["'layrs'", "layers"]),
        "key of another group": (train("--config.model.batch_size=3"), {}, ["'batch_size'"]),
        "wrong type": (train("--config.model.layers=many"), {}, ["layers", "many"]),
        "contradiction": (
            train("--config.model.layers=10"),
            {},
            ["config.model.layers = 10", "6, 9, 12"],
        ),
        "misspelt config argument": (
            ("train", "--config", "configs/quickstart.py:vanila", "--workdir", d / "never"),
            {},
            ["'vanila'", "vanilla"],
        ),
        "misspelt size": (
            ("train", "--config", "configs/mor.py:370m", "--workdir", d / "never"),
            {},
            ["370m", "360m"],
        ),
        "config file missing": (
            ("train", "--config", d / "nowhere.py", "--workdir", d / "never"),
            {},
            ["--config", "nowhere.py"],
        ),
        "no config": (("train", "--workdir", d / "never"), {}, ["--config is missing"]),
        "no workdir": (("train", "--config", config), {}, ["workdir"]),
        "unknown flag": (train("--wrokdir=x"), {}, ["wrokdir"]),
        "stray argument": (train("stray"), {}, ["stray"]),
        "workdir is a file": (
            ("train", "--config", config, "--workdir", d / "empty.txt"),
            {},
            ["empty.txt"],
        ),
        "corpus is garbage": (corpus("garbage.txt.gz"), {}, ["garbage.txt.gz", "cannot be read"]),
        "corpus is empty": (corpus("empty.txt"), {}, ["empty.txt"]),
        "corpus is blank": (corpus("blank.jsonl"), {}, ["blank.jsonl"]),
        "corpus is latin-1": (corpus("latin.txt"), {}, ["latin.txt", "UTF-8"]),
        "corpus is broken": (corpus("broken.jsonl"), {}, ["broken.jsonl, line 2", "JSON"]),
        "no corpus": (corpus("*.md"), {}, ["*.md", "matches no file"]),
        "cache is not writable": (
            train(f"--config.data.cache_dir={d / 'empty.txt'}"),
            {},
            ["empty.txt"],
        ),
        "no checkpoint": (("evaluate", "--checkpoint", d / "nowhere"), {}, ["nowhere"]),
        "run without a checkpoint": (("evaluate", "--checkpoint", d / "no_run"), {}, ["no_run"]),
        "unknown step": (generate("--step", 50, "--prompt", "x"), {}, ["50", "80", "100", "120"]),
        "stdin is not UTF-8": (
            generate(),
            {"stdin": b"caf\xe9 au lait"},
            ["standard input", "UTF-8"],
        ),
        "stdin is not UTF-8, C locale": (
            generate(),
            {"stdin": b"caf\xe9", "LC_ALL": "C", "PYTHONUTF8": "0"},
            ["standard input", "UTF-8"],
        ),
        "temperature": (generate("--prompt", "x", "--temperature", -1), {}, ["temperature", "-1"]),
        "top_k": (generate("--prompt", "x", "--top_k", -1), {}, ["top_k", "-1"]),
        "top_p": (generate("--prompt", "x", "--top_p", 1.5), {}, ["top_p", "1.5"]),
        "not a number": (generate("--prompt", "x", "--seed", "abc"), {}, ["seed", "abc"]),
        "prompt too long": (generate("--prompt", "x" * 40), {}, ["prompt", "41", "32"]),
        "max_tokens": (generate("--prompt", "x", "--max_tokens", -3), {}, ["max_tokens", "-3"]),
        "too large a tokenizer": (
            generate("--prompt", "x", "--tokenizer", d / "bpe400"),
            {},
            ["bpe400", "does not fit"],
        ),
        "another tokenizer": (
            generate("--prompt", "x", "--tokenizer", d / "bpe300"),
            {},
            ["bpe300", "does not fit"],
        ),
        "no tokenizer": (
            generate("--prompt", "x", "--tokenizer", d / "nowhere.json"),
            {},
            ["nowhere.json"],
        ),
        "mean depth": (
            generate("--prompt", "x", "--mean_depth", 3.5),
            {},
            ["mean depth of 3.5", "between 0 and 3"],
        ),
        "depths at odds": (
            generate("--prompt", "x", "--mean_depth", 2.5, "--max_depth", 2),
            {},
            ["mean depth of 2.5", "0 and 2"],
        ),
        "maximum depth": (
            generate("--prompt", "x", "--max_depth", 4),
            {},
            ["maximum depth", "from 1 to 3", "4"],
        ),
        "nothing to dial": (
            ("generate", "--checkpoint", trained.vanilla, "--prompt", "x", "--mean_depth", 1),
            {},
            ["'fixed'", "no mean depth"],
        ),
        "no depths to compare": (
            ("depth_curve", "--checkpoint", trained.vanilla, "--out", d / "never_curve"),
            {},
            ["once", "recursions"],
        ),
        "report of nothing": (("report",), {}, ["run directory"]),
        "report of no run": (("report", d / "no_run", "--out", d / "r.html"), {}, ["no_run"]),
        "damaged, evaluate": (
            ("evaluate", "--checkpoint", d / "damaged"),
            {},
            ["step 120", "damaged", "--step=100"],
        ),
        "damaged, generate": (
            ("generate", "--checkpoint", d / "damaged", "--prompt", "x"),
            {},
            ["step 120", "damaged", "--step=100"],
        ),
    }
    if os.geteuid() != 0:  # root may read anything
        found["corpus is locked"] = (corpus("locked.txt"), {}, ["locked.txt", "permission"])
    return found


@pytest.fixture(scope="module")
def outcomes(place, trained):
    """Every case run once, as many at a time as there are cores."""
    d, config = place
    every = cases(d, config, trained)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {name: pool.submit(run, *args, **extra) for name, (args, extra, _) in every.items()}
        yield {name: (job.result(), every[name][2]) for name, job in jobs.items()}
    assert not list(d.glob("never*/checkpoints"))


NAMES = list(cases(Path(), Path(), Trained(Path(), Path(), Path(), Path())))


@pytest.mark.parametrize("name", NAMES)
def test_one_line_and_status_2(outcomes, name):
    done, parts = outcomes[name]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.rstrip().splitlines()[-1] == message
    for part in parts:
        assert part in message


def test_earlier_checkpoint_of_a_damaged_run_loads(place, trained, outcomes):
    done = run(
        "generate",
        "--checkpoint",
        place[0] / "damaged",
        "--step",
        100,
        "--prompt",
        "def ",
        "--max_tokens",
        5,
    )
    assert done.returncode == 0 and done.stdout.startswith("def "), done.stderr
    # looking at a damaged run has not changed it
    names = sorted(p.name for p in (place[0] / "damaged" / "checkpoints").iterdir())
    assert names == ["100", "120", "80"]


def test_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(place):
    d, config = place
    workdir = d / "diverged"
    done = run(
        "train",
        "--config",
        f"{config}:vanilla",
        "--workdir",
        workdir,
        "--config.optim.peak_lr=1e15",
        "--config.train.checkpoint_every=1",
        "--config.train.eval_every=0",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    steps = [r["step"] for r in records(workdir, "train")]
    assert (
        f"at step {steps[-1] + 1};" in message
        and f"last good checkpoint is of step {steps[-1]}" in message
    )
    assert "config.optim.peak_lr" in message
    assert load_meta(workdir / "checkpoints")[0] == steps[-1]
    assert not (workdir / "summary.json").exists()
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


@pytest.fixture
def small_disk(tmp_path):
    """A run directory whose checkpoints/ is a file system of 1 MB."""
    target = tmp_path / "run" / "checkpoints"
    target.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(target)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as e:
        pytest.skip(f"no mount command: {e}")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield tmp_path / "run"
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_full_disk_while_saving(place, small_disk):
    _, config = place
    done = run(
        "train",
        "--config",
        f"{config}:vanilla",
        "--workdir",
        small_disk,
        "--config.train.checkpoint_every=5",
        "--config.train.eval_every=0",
        "--config.train.keep_checkpoints=50",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "could not save step" in message and "No space left on device" in message
    assert "Earlier checkpoints are intact" in message
    # and nothing half-written
    kept = sorted(int(p.name) for p in (small_disk / "checkpoints").iterdir())
    assert (
        kept == list(range(5, kept[-1] + 1, 5))
        and f"could not save step {kept[-1] + 5} " in message
    )
    assert load_model(small_disk).step == kept[-1]  # verified while it is read
