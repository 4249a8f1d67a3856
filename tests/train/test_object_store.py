"""Runs, corpora, caches and reports in object stores: the real clients against real servers on this
machine."""

import contextlib
import functools
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from object_store import SCHEMES, serve
from train.tiny_run import ROOT, command, environment, run, write_config, write_corpus

from mor_jax.config import DataConfig
from mor_jax.data.prepare import cache_root, prepare
from mor_jax.errors import DataError, UserError
from mor_jax.paths import as_path, filesystem, is_local, scheme_of
from mor_jax.train.checkpoint import Checkpointer, load_meta

STEPS, EVERY, KILL_AT = 30, 10, 10
TIMING = {"time_s", "tokens_per_s", "flops_per_s", "mfu"}


@pytest.fixture(scope="module", params=SCHEMES)
def store(request):
    """A server; this process and the commands it starts know of it."""
    with serve(request.param) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.env.items():
            patch.setenv(name, value)
        patch.setenv("MOR_JAX_LOCK_SECONDS", "1")
        filesystem(found.root).clear_instance_cache()  # of a server that has gone
        yield found


run = functools.partial(run, timeout=900)  # a command and a server of Python beside other tests


def upload(local, address):
    as_path(address).write_bytes(local.read_bytes())


def records(address, kind):
    lines = as_path(f"{address}/metrics.jsonl").read_text().splitlines()
    found = [r for r in map(json.loads, lines) if r["kind"] == kind]
    assert [r["step"] for r in found] == sorted({r["step"] for r in found})
    return {r["step"]: {k: v for k, v in r.items() if k not in TIMING} for r in found}


@pytest.fixture(scope="module")
def place(store, tmp_path_factory):
    """A corpus in the store, and the arguments of a short run on it."""
    directory = tmp_path_factory.mktemp(store.scheme)
    upload(write_corpus(directory), f"{store.root}/corpus/text.jsonl")
    config = write_config(directory, f"{store.root}/corpus/*.jsonl")
    return directory, [
        "--config",
        config,
        f"--config.train.steps={STEPS}",
        f"--config.train.eval_every={EVERY}",
        f"--config.train.checkpoint_every={EVERY}",
        f"--config.data.cache_dir={store.root}/cache",
    ]


@pytest.fixture(scope="module")
def whole(store, place):
    """An undisturbed run."""
    done = run("train", *place[1], "--workdir", f"{store.root}/whole")
    assert done.returncode == 0, done.stderr
    return f"{store.root}/whole"


def test_a_run_leaves_in_the_store_what_it_leaves_on_a_disk(store, place, whole):
    names = {p.name for p in as_path(whole).iterdir()}
    expected = {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "goodput.json",
        "summary.json",
        "sample.txt",
        "tensorboard",
        "program",
        "checkpoints",
    }
    assert names == expected  # and no lock
    assert sorted(records(whole, "train")) == list(range(1, STEPS + 1))
    assert sorted(p.name for p in as_path(f"{whole}/checkpoints").iterdir()) == ["10", "20", "30"]
    assert load_meta(f"{whole}/checkpoints")[0] == STEPS
    assert not any(":" in name for name in os.listdir(ROOT))  # no folder named after a scheme


def test_a_killed_run_goes_on_and_loses_no_line(store, place, whole):
    """Killed between two checkpoints; after the resume every number is that of the undisturbed
    run."""
    import subprocess

    workdir = f"{store.root}/killed"
    process = subprocess.Popen(
        command("train", *place[1], "--workdir", workdir),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 900
    while not as_path(
        f"{workdir}/checkpoints/{KILL_AT // EVERY * EVERY}/commit_success.txt"
    ).exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = max(
        int(p.name)
        for p in as_path(f"{workdir}/checkpoints").iterdir()
        if (p / "commit_success.txt").exists()
    )
    assert not as_path(f"{workdir}/summary.json").exists()
    # no checkpoint knows more than the curve
    assert set(records(workdir, "train")) >= set(range(1, kept + 1))
    assert as_path(f"{workdir}/run.lock").exists()

    done = run("train", *place[1], "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert "Resuming" in done.stderr
    for kind in ("train", "eval"):
        assert records(workdir, kind) == records(whole, kind), kind
    mine, theirs = (json.loads(as_path(f"{w}/summary.json").read_text()) for w in (workdir, whole))
    assert mine["eval"] == theirs["eval"]


def test_the_readers_read_it(store, place, whole, tmp_path):
    """Evaluation, generation, report and conversion take the address where they take a
    directory."""
    done = run("evaluate", "--checkpoint", whole, "--out", f"{store.root}/out/record.json")
    assert done.returncode == 0, done.stderr
    written = json.loads(as_path(f"{store.root}/out/record.json").read_text())
    assert written["causal/nll"] == pytest.approx(
        records(whole, "eval")[STEPS]["causal/nll"], rel=1e-6
    )
    done = run("generate", "--checkpoint", whole, "--prompt", "def ", "--max_tokens", 4)
    assert done.returncode == 0 and done.stdout.startswith("def "), done.stderr
    done = run("report", whole, "--out", f"{store.root}/out/report.html")
    assert done.returncode == 0, done.stderr
    assert "</html>" in as_path(f"{store.root}/out/report.html").read_text()


def test_prepared_data_goes_through_the_store(store, place, tmp_path, monkeypatch):
    """What one machine prepared the next one fetches: the same bytes, without a look at the
    tokenizer."""
    cfg = DataConfig(
        source="files", paths=(f"{store.root}/corpus/*.jsonl",), cache_dir=f"{store.root}/cache2"
    )
    found = []
    for machine in ("one", "two"):
        monkeypatch.setenv("MOR_JAX_CACHE", str(tmp_path / machine))
        assert cache_root(cfg) == tmp_path / machine / "data"
        if machine == "two":
            monkeypatch.setattr(
                "mor_jax.data.prepare._write", lambda *_: pytest.fail("prepared anew")
            )
        found.append(prepare(cfg, 32, progress=False))
    one, two = found
    assert one.fingerprint == two.fingerprint and one.stats == two.stats
    for i in range(len(one.train)):
        np.testing.assert_array_equal(one.train[i]["tokens"], two.train[i]["tokens"])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".xz"])
def test_a_corpus_is_the_same_here_and_there(store, tmp_path, suffix):
    """Content and names decide, not where it lies: the same fingerprint, so that a run goes on with
    a moved corpus."""
    import gzip
    import lzma

    import zstandard

    text = b'{"text": "one"}\n{"text": "two and more"}\n'
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }[suffix]
    for name in ("a", "deep/b"):
        path = tmp_path / "corpus" / f"{name}.jsonl{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(text))
        upload(path, f"{store.root}/moved{suffix}/{name}.jsonl{suffix}")
    here = DataConfig(
        source="files",
        paths=(f"{tmp_path}/corpus/**/*.jsonl{suffix}",),
        cache_dir=str(tmp_path / "c"),
    )
    there = DataConfig(
        source="files",
        paths=(f"{store.root}/moved{suffix}/**/*.jsonl{suffix}",),
        cache_dir=str(tmp_path / "d"),
    )
    assert (
        prepare(here, 8, progress=False).fingerprint
        == prepare(there, 8, progress=False).fingerprint
    )


def state(n):
    return {"params": {"a": jnp.arange(10.0) * n, "b": jnp.ones((30, 30))}, "step": jnp.int32(n)}


def test_a_damaged_checkpoint_is_set_aside(store):
    directory = as_path(f"{store.root}/checks/{time.time_ns()}")
    shape = jax.eval_shape(lambda: state(1))
    with Checkpointer(directory, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"n": step})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3]
    (directory / "3" / "meta" / "metadata").write_text("{")
    (directory / "2" / "commit_success.txt").unlink()  # a save that was cut off
    with Checkpointer(directory, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 3]
        found = checkpoints.restore_latest(shape)
        assert found.step == 1 and list(found.skipped) == [3]
        np.testing.assert_array_equal(found.state["params"]["a"], np.arange(10.0))
        checkpoints.save(2, state(2), {"n": 2})
        checkpoints.save(3, state(3), {"n": 3})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3]
        assert float(checkpoints.restore_latest(shape).state["params"]["a"][1]) == 3.0
    assert (directory / "3.damaged" / "meta" / "metadata").read_text() == "{"


def test_no_such_bucket_is_said_at_the_start(store, place):
    done = run("train", *place[1], "--workdir", f"{store.scheme}://elsewhere/run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no such bucket" in done.stderr and "preparing" not in done.stderr
    with pytest.raises(DataError, match="matches no file"):
        prepare(
            DataConfig(source="files", paths=(f"{store.root}/none/*.jsonl",)), 8, progress=False
        )


@pytest.mark.parametrize(
    ("given", "scheme"),
    [
        ("runs/a", ""),
        ("/a:b/c", ""),
        ("gs://b/x", "gs"),
        ("gs:/b/x", "gs"),
        ("S3://b", "s3"),
        ("c:/x", ""),
        ("a://b", "a"),
    ],
)
def test_schemes(given, scheme):
    assert scheme_of(given) == scheme and is_local(given) == (not scheme)


@pytest.mark.parametrize("given", ["ftp://host/run", "az://bucket/run", "s3:///run"])
def test_an_address_nobody_serves_is_refused(given):
    with pytest.raises(UserError, match=r"serves|bucket"):
        as_path(given)
    done = run("train", "--config", "configs/quickstart.py", "--workdir", given)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    with contextlib.suppress(FileNotFoundError):
        assert not (ROOT / given.partition("/")[0]).exists()
