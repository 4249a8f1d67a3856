"""What may change between a run and its resumption: freely, by leave, never. On a run of a few
steps, in this process."""

import dataclasses
import json
import shutil

import pytest
from train.tiny_run import write_corpus

from mor_jax.config import Config, depth_policies, from_dict
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.train.loop import train
from mor_jax.train.workdir import FREE, NEVER, differences, kind_of

SMALL = {
    "model": {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "mlp_width": 32,
        "context": 16,
        "loss_chunk": 0,
    },
    "train": {
        "steps": 4,
        "batch_size": 4,
        "log_every": 1,
        "eval_every": 0,
        "eval_rows": 4,
        "checkpoint_every": 2,
    },
}


def config(**fields):
    raw = json.loads(json.dumps(SMALL))
    for name, value in fields.items():
        group, _, key = name.partition("__")
        if key:
            raw.setdefault(group, {})[key] = value
        else:
            raw[group] = value
    return from_dict(raw)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run whose end was taken back: it has a checkpoint of step 2."""
    directory = tmp_path_factory.mktemp("changes")
    corpus = write_corpus(directory / "corpus")
    data = {"source": "files", "paths": (str(corpus),), "cache_dir": str(directory / "cache")}
    train(config(data=data), directory / "run", progress=False)
    (directory / "run" / "summary.json").unlink()
    shutil.rmtree(directory / "run" / "checkpoints" / "4")
    return directory, data


def again(begun, workdir, allow=(), **fields):
    directory, data = begun
    shutil.copytree(directory / "run", workdir)
    data = data | fields.pop("data", {})
    return train(config(data=data, **fields), workdir, progress=False, allow=allow)


def curve(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r for r in lines if r["kind"] == "train"}, workdir


def test_every_field_is_of_one_kind():
    fields = {
        f"{g}.{f.name}"
        for g in (f.name for f in dataclasses.fields(Config) if f.name != "name")
        for f in dataclasses.fields(type(getattr(Config(), g)))
    } | {"name"}
    fields |= {
        f"depth.{f.name}"
        for policy in depth_policies().values()
        for f in dataclasses.fields(policy)
    }
    assert {kind_of(f) for f in fields} == {"free", "allow", "never"}
    groups = {f.partition(".")[0] for f in fields}
    assert fields | groups >= FREE | NEVER  # no name that has gone
    assert kind_of("model.width") == kind_of("model.layers") == kind_of("depth.policy") == "never"
    assert (
        kind_of("optim.peak_lr") == kind_of("train.batch_size") == kind_of("data.seed") == "allow"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "another"},
        {"model__remat": "block"},
        {"model__attention": "xla"},
        {"model__loss_chunk": 8},
        {"train__log_every": 2},
        {"train__eval_every": 2},
        {"train__checkpoint_every": 1},
        {"train__accum": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_free(begun, tmp_path, fields):
    done = again(begun, tmp_path / "run", **fields)
    assert done["finished"] and done["steps"] == 4
    (was, _), (now, _) = curve(begun[0] / "run"), curve(tmp_path / "run")
    # float32 sums in another order
    assert now[4]["loss"] == pytest.approx(was[4]["loss"], rel=1e-5)


def test_a_moved_corpus_of_the_same_content_is_free(begun, tmp_path):
    """The file lies elsewhere; names below the fixed folder, and content, are the same."""
    shutil.copytree(begun[0] / "corpus", tmp_path / "elsewhere" / "deep")
    paths = (str(tmp_path / "elsewhere" / "deep" / "corpus.jsonl"),)
    assert again(begun, tmp_path / "run", data={"paths": paths})["finished"]


def test_other_content_needs_leave(begun, tmp_path):
    paths = (str(write_corpus(tmp_path / "corpus", seed=5)),)
    with pytest.raises(CheckpointError, match=r"corpus has changed .*--allow=data.paths"):
        again(begun, tmp_path / "run", data={"paths": paths})
    shutil.rmtree(tmp_path / "run")
    assert again(begun, tmp_path / "run", data={"paths": paths}, allow=["data.paths"])["finished"]


@pytest.mark.parametrize("allow", ["optim.peak_lr", "config.optim.peak_lr", "optim"])
def test_by_leave(begun, tmp_path, allow):
    with pytest.raises(
        ConfigError, match=r"optim.peak_lr: 0.003 there, 0.001 here.*--allow=optim.peak_lr"
    ):
        again(begun, tmp_path / "run", optim__peak_lr=1e-3)
    shutil.rmtree(tmp_path / "run")
    assert again(begun, tmp_path / "run", optim__peak_lr=1e-3, allow=[allow])["finished"]
    [event] = [
        r
        for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if r["kind"] == "event"
    ]
    assert event["step"] == 2 and "optim.peak_lr: 0.003 there" in event["fields"][0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["peak_lr"] == 1e-3
    (was, _), (now, _) = curve(begun[0] / "run"), curve(tmp_path / "run")
    assert now[2]["lr"] == was[2]["lr"] and now[3]["lr"] == pytest.approx(was[3]["lr"] / 3)


def test_a_finished_run_goes_on_with_more_steps(begun, tmp_path):
    assert again(begun, tmp_path / "run")["steps"] == 4
    cfg = config(data=begun[1], train__steps=6)
    with pytest.raises(ConfigError, match=r"train\.steps"):
        train(cfg, tmp_path / "run", progress=False)
    assert train(cfg, tmp_path / "run", progress=False, allow=["train.steps"])["steps"] == 6
    assert sorted(curve(tmp_path / "run")[0]) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("allow", "said"),
    [
        ("model.width", "model.width can never change"),
        ("model", "model can never"),
        ("optim.peek", "Did you mean optim.peak_lr"),
    ],
)
def test_what_leave_cannot_be_given_for(begun, tmp_path, allow, said):
    with pytest.raises(ConfigError, match=said):
        again(begun, tmp_path / "run", allow=[allow], model__width=32)


def test_never(begun, tmp_path):
    with pytest.raises(
        ConfigError, match=r"model.width: 16 there, 32 here.* can never change .*another --workdir"
    ):
        again(begun, tmp_path / "run", model__width=32, allow=["optim", "train"])


def test_a_finished_run_of_another_corpus_is_not_taken_for_this_one(begun, tmp_path):
    assert again(begun, tmp_path / "run")["finished"]
    paths = (str(write_corpus(tmp_path / "corpus", seed=6)),)
    with pytest.raises(CheckpointError, match="corpus has changed"):
        train(config(data=begun[1] | {"paths": paths}), tmp_path / "run", progress=False)
    assert differences({"data": {"paths": ["a"]}}, {"data": {"paths": ["b"]}}) == []
    # what sweeps go by
    assert differences({"data": {"paths": ["a"]}}, {"data": {"paths": ["b"]}}, paths=True)
