"""From an unshared run to a recursive one that its source teaches, as configs/uptrain.py has it."""

import json

import pytest
from train.tiny_run import write_corpus

from configs import uptrain
from mor_jax.config import from_config_dict, from_dict
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.train.convert import convert_checkpoint
from mor_jax.train.load import load_model
from mor_jax.train.loop import train

TRAIN = {
    "steps": 2,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 0,
    "eval_rows": 4,
    "checkpoint_every": 0,
}
MODEL = {
    "layers": 4,
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "mlp_width": 32,
    "context": 32,
    "loss_chunk": 0,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uptrain")
    corpus = write_corpus(directory / "corpus")
    data = {
        "source": "files",
        "paths": (str(corpus),),
        "cache_dir": str(directory / "cache"),
        "tokenizer": "bytes",
    }
    train(
        from_dict({"model": MODEL, "data": data, "train": TRAIN}),
        directory / "vanilla",
        progress=False,
    )
    return directory / "vanilla"


def config(source, arg="mor", **distill):
    made = uptrain.get_config(f"{arg},source={source}")
    made.train.update(TRAIN)
    made.distill.update(distill)
    return from_config_dict(made)


@pytest.fixture(scope="module")
def converted(source):
    cfg = config(source)
    convert_checkpoint(source, cfg, source.parent / "mor", progress=False)
    return source.parent / "mor"


def records(workdir, kind="train"):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def test_the_configuration_takes_the_shape_of_the_source(source, converted):
    cfg = config(source)
    assert (cfg.model.width, cfg.model.layers, cfg.model.recursions) == (16, 4, 2)
    assert cfg.depth.policy == "expert_choice" and cfg.distill.teacher == str(source)
    more = config(converted, "recursive,nr=3").model  # its core once more
    assert (more.layers, more.recursions, more.sharing) == (5, 3, "middle_cycle")
    with pytest.raises(ConfigError, match="source=runs/vanilla"):
        uptrain.get_config("mor")


def test_a_run_learns_from_its_source(source, converted, tmp_path):
    """The loss is the share of each; the distillation loss is reported apart."""
    taught = config(source, weight=0.25, temperature=2.0)
    train(taught, tmp_path / "whole", progress=False, init_from=converted)
    whole = records(tmp_path / "whole")
    for r in whole:
        own = r["router_loss"] * taught.depth.aux_loss_weight
        assert r["distill_loss"] > 0
        assert r["loss"] == pytest.approx(
            0.75 * r["lm_loss"] + 0.25 * r["distill_loss"] + own, rel=1e-5
        )
    assert load_model(tmp_path / "whole").lineage["parent"] == str(converted)


def test_a_teacher_that_cannot_teach_is_named(source, converted, tmp_path):
    cfg = config(source, weight=0.5)

    def vary(**groups):
        return from_dict(cfg.to_dict() | {k: cfg.to_dict()[k] | v for k, v in groups.items()})

    cases = [
        (
            vary(data={"tokenizer": "bpe", "bpe_vocab": 300}, model={"vocab_size": 320}),
            "another tokenizer",
        ),
        (vary(model={"context": 64}), "reads 32 tokens at most"),
        (vary(model={"vocab_size": 512}), "a table of 320 tokens"),
        (vary(distill={"teacher": str(tmp_path / "nowhere")}), "nowhere"),
    ]
    for wrong, said in cases:
        with pytest.raises(CheckpointError, match=said):
            train(wrong, tmp_path / "run", progress=False)
        (tmp_path / "run" / "config.json").unlink()
    for fields in ({"weight": 1.5}, {"temperature": 0.0}, {"teacher": ""}):
        with pytest.raises(ConfigError, match=r"config\.distill\."):
            config(source, **{"weight": 0.5} | fields)
