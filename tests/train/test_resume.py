"""A run that was stopped, however rudely, goes on as if nothing had happened: real processes, real
signals."""

import json
import shutil
import signal

import pytest
from train.tiny_run import records, run, start, wait_for_step, write_config, write_corpus

from mor_jax.data.tokenizer import ByteTokenizer, train_bpe

TIMING = {"time_s", "tokens_per_s", "flops_per_s", "mfu"}
STEPS, EVERY, KILL_AT = 120, 20, 50


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Corpus, tokenizer file and config, shared by the runs."""
    directory = tmp_path_factory.mktemp("resume")
    corpus = write_corpus(directory)
    tokenizer = ByteTokenizer().save(directory / "tokenizer")
    config = write_config(directory, corpus)
    return directory, ["--config", config, f"--config.data.tokenizer={tokenizer}"]


def numbers(workdir, kind):
    """{step: record} without the times; every step once."""
    found = records(workdir, kind)
    assert [r["step"] for r in found] == sorted({r["step"] for r in found})
    return {r["step"]: {k: v for k, v in r.items() if k not in TIMING} for r in found}


def contents(workdir):
    return {
        str(p.relative_to(workdir)): p.read_bytes()
        for p in sorted(workdir.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(place):
    directory, args = place
    done = run("train", *args, "--workdir", directory / "whole")
    assert done.returncode == 0, done.stderr
    return directory / "whole"


@pytest.fixture(scope="module")
def killed(place, whole):
    """A run killed between two checkpoints."""
    directory, args = place
    process = start("train", *args, "--workdir", directory / "killed")
    wait_for_step(process, directory / "killed", KILL_AT)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (directory / "killed" / "summary.json").exists()
    return directory / "killed"


def same_as_whole(workdir, whole):
    for kind in ("train", "eval"):
        assert numbers(workdir, kind) == numbers(whole, kind), kind
    assert sorted(numbers(workdir, "train")) == list(range(1, STEPS + 1))
    mine, theirs = (json.loads((d / "summary.json").read_text()) for d in (workdir, whole))
    assert mine["eval"] == theirs["eval"] and mine["finished"] is True


def test_whole_run_left_what_it_promises(whole):
    assert sorted(numbers(whole, "train")) == list(range(1, STEPS + 1))
    assert sorted(numbers(whole, "eval")) == list(range(EVERY, STEPS + 1, EVERY))
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["100", "120", "80"]
    for name in ("config.json", "tokenizer.json", "summary.json", "tensorboard"):
        assert (whole / name).exists()


def test_killed_run_resumes_bit_for_bit(place, whole, killed):
    workdir = killed.with_name("resumed")
    shutil.copytree(killed, workdir)
    done = run("train", *place[1], "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert "Resuming" in done.stderr
    same_as_whole(workdir, whole)


def test_terminated_run_saves_and_resumes(place, whole):
    directory, args = place
    workdir = directory / "terminated"
    process = start("train", *args, "--workdir", workdir)
    wait_for_step(process, workdir, KILL_AT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    stopped = max(numbers(workdir, "train"))
    assert KILL_AT <= stopped < STEPS
    assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == stopped
    done = run("train", *args, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert f"after step {stopped}" in done.stderr
    same_as_whole(workdir, whole)


def test_finished_run_is_left_alone(place, whole):
    before = contents(whole)
    done = run("train", *place[1], "--workdir", whole)
    assert done.returncode == 0 and "is finished" in done.stderr
    assert contents(whole) == before


def refused(workdir, args, *parts):
    """The command refuses in one line with these words and changes nothing in the run."""
    before = contents(workdir)
    done = run("train", *args, "--workdir", workdir)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    [message] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in message
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("--config.model.width=32", "config.model.width: 16 there, 32 here"),
        ("--config.optim.peak_lr=1e-3", "config.optim.peak_lr: 0.003 there, 0.001 here"),
        ("--config.data.tokenizer=bytes", "config.data.tokenizer"),
    ],
)
def test_changed_configuration_is_refused(place, killed, override, field):
    refused(killed, [*place[1], override], field, "another --workdir")


def test_changed_corpus_is_refused(place, killed):
    corpus = place[0] / "corpus.jsonl"
    text = corpus.read_text()
    corpus.write_text(text + json.dumps({"text": "one more document"}) + "\n")
    try:
        refused(killed, place[1], "the corpus has changed", "another --workdir")
    finally:
        corpus.write_text(text)


def test_changed_tokenizer_is_refused(place, killed):
    """Another tokenizer under the same name and of the same padded size."""
    path = place[0] / "tokenizer" / "tokenizer.json"
    text = path.read_text()
    train_bpe(["def step loss value return depth " * 20], 300).save(path.parent)
    try:
        refused(killed, place[1], "tokenizer", "does not fit the checkpoint", "another --workdir")
    finally:
        path.write_text(text)


def test_a_run_that_draws_its_steps_resumes_bit_for_bit(place):
    """How many steps over the core a batch or a row runs, and its random first state, are functions
    of the number of the step: a run that goes on from an older checkpoint has the same ones."""
    directory, args = place
    knobs = dict(state="random", injection="concat", sampling="poisson", gradient_steps=1)
    path = directory / "drawn.py"
    routed = 'depth=dict(policy="expert_choice" if mor else "fixed")'
    text = (directory / "tiny.py").read_text()
    assert routed in text
    path.write_text(text.replace(routed, f'depth=dict(policy="fixed"), recursion={knobs}'))
    args = ["--config", path, *args[2:], "--config.train.steps=16", "--config.train.eval_every=16"]
    args.append("--config.train.checkpoint_every=8")
    whole, again = directory / "drawn", directory / "drawn again"
    assert run("train", *args, "--workdir", whole).returncode == 0
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "16")
    (again / "summary.json").unlink()
    done = run("train", *args, "--workdir", again)
    assert done.returncode == 0 and "after step 8" in done.stderr, done.stderr
    mine, theirs = numbers(again, "train"), numbers(whole, "train")
    assert mine == theirs and sorted(mine) == list(range(1, 17))
    assert len({record["mean_depth"] for record in mine.values()}) > 2
    assert numbers(again, "eval") == numbers(whole, "eval")
