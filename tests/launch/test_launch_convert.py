"""`launch.convert`: from an unshared run to a recursive one that trains, evaluates and
generates."""

import json

import numpy as np
import pytest
from train.tiny_run import records, run, write_config, write_corpus

from mor_jax.config import from_dict
from mor_jax.errors import CheckpointError, UserError
from mor_jax.train.checkpoint import load_meta
from mor_jax.train.convert import convert_checkpoint
from mor_jax.train.load import load_model
from mor_jax.train.loop import train

DEEP = ("--config.model.layers=3", "--config.train.steps=10", "--config.train.eval_every=5")
SHORT = (
    "--config.train.steps=6",
    "--config.train.eval_every=0",
    "--config.train.checkpoint_every=3",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unshared run of three layers, and its config file."""
    d = tmp_path_factory.mktemp("source")
    config = write_config(d, write_corpus(d))
    done = run("train", "--config", f"{config}:vanilla", "--workdir", d / "vanilla", *DEEP)
    assert done.returncode == 0, done.stderr
    return d, config


@pytest.mark.parametrize("method", ["stepwise", "average"])
def test_the_converted_run_evaluates_generates_and_trains_on(source, method, tmp_path):
    d, config = source
    target = tmp_path / "mor"
    args = ("--config", f"{config}:mor", "--workdir", target, *SHORT)
    done = run("convert", "--checkpoint", d / "vanilla", "--method", method, *args)
    assert done.returncode == 0, done.stderr
    assert "(0) × 3" in done.stdout and "step 10" in done.stdout
    assert (
        "mean of layers 0 1 2" in done.stdout
        if method == "average"
        else "block 0 = layer 0" in done.stdout
    )
    step, meta = load_meta(target / "checkpoints")
    assert step == 0 and meta["converted"]["method"] == method and meta["converted"]["step"] == 10

    old, new = load_model(d / "vanilla"), load_model(target)
    layers = [np.asarray(old.params["core"][i]["mlp"]["down"]) for i in ("0", "1", "2")]
    expected = np.mean(layers, axis=0) if method == "average" else layers[0]
    np.testing.assert_allclose(
        new.params["core"]["0"]["mlp"]["down"], expected, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(new.params["embed"]["table"], old.params["embed"]["table"])
    assert run("evaluate", "--checkpoint", target).returncode == 0
    assert run(
        "generate", "--checkpoint", target, "--prompt", "def ", "--max_tokens", 3
    ).stdout.startswith("def ")

    done = run("train", *args)
    assert done.returncode == 0, done.stderr
    assert "Resuming" in done.stderr + done.stdout and (target / "summary.json").exists()
    assert [r["step"] for r in records(target, "train")] == [1, 2, 3, 4, 5, 6]


def test_unshared_to_itself_starts_at_the_loss_the_source_ended_with(source, tmp_path):
    d, config = source
    done = run(
        "convert",
        "--checkpoint",
        d / "vanilla",
        "--config",
        f"{config}:vanilla",
        "--workdir",
        tmp_path / "again",
        "--config.model.layers=3",
        "--config.train.steps=5",
    )
    assert done.returncode == 0, done.stderr
    done = run("evaluate", "--checkpoint", tmp_path / "again", "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    ended, starts = (
        records(d / "vanilla", "eval")[-1],
        json.loads((tmp_path / "out.json").read_text()),
    )
    assert starts["causal/nll"] == pytest.approx(ended["causal/nll"], abs=1e-6)


def test_training_goes_on_in_process_with_a_fresh_optimiser(source, tmp_path):
    d, _ = source
    raw = json.loads((d / "vanilla" / "config.json").read_text())
    raw["model"] |= {"layers": 4, "sharing": "middle_cycle", "recursions": 2}
    raw["train"] |= {"steps": 2, "eval_every": 0, "checkpoint_every": 0}
    cfg = from_dict(raw)
    done = convert_checkpoint(d / "vanilla", cfg, tmp_path / "up", "lower", progress=False)
    assert (
        done.table == {"prelude": ((0,),), "core": ((1,),), "coda": ((2,),)}
        and done.source_step == 10
    )
    assert train(cfg, tmp_path / "up", progress=False)["finished"]
    with pytest.raises(CheckpointError, match="already holds a run"):
        convert_checkpoint(d / "vanilla", cfg, tmp_path / "up", progress=False)


def test_mistakes_are_one_line(source, trained, tmp_path):
    d, config = source
    into = ("--config", f"{config}:mor", "--workdir", tmp_path / "never")
    cases = [
        (("--checkpoint", d / "vanilla", "--config.model.width=32"), "width 16 there, 32"),
        (("--checkpoint", trained.mor, "--config.model.layers=6"), "keep"),
        (("--checkpoint", d / "vanilla", "--method", "middle"), "stepwise"),
    ]
    for args, word in cases:
        done = run("convert", *into, *args)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("error: ") and word in message, message
    assert not (tmp_path / "never").exists()


def test_what_cannot_be_converted_is_refused_before_anything_is_written(source, tmp_path):
    d, _ = source
    raw = json.loads((d / "vanilla" / "config.json").read_text())

    def changed(group, **fields):
        return from_dict(raw | {group: raw[group] | fields})

    cases = [
        (d / "nowhere", changed("train"), "nowhere"),
        (d / "vanilla", changed("model", layers=12, sharing="cycle", recursions=3), "too few"),
        (d / "vanilla", changed("data", tokenizer="bpe", bpe_vocab=300), "vanilla/tokenizer.json"),
    ]
    for source_run, cfg, word in cases:
        with pytest.raises(UserError, match=word):
            convert_checkpoint(source_run, cfg, tmp_path / "never", progress=False)
    assert not (tmp_path / "never").exists()
