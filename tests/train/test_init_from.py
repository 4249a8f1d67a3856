"""New runs from old weights: what starts fresh, what is recorded, what is refused; and fine-tuning
on conversations."""

import json

import jax
import numpy as np
import pytest
from train.tiny_run import write_corpus

from mor_jax.config import from_dict
from mor_jax.data.chat import find_template
from mor_jax.errors import CheckpointError
from mor_jax.train.load import load_model
from mor_jax.train.loop import train

MODEL = {
    "layers": 3,
    "recursions": 3,
    "sharing": "cycle",
    "width": 16,
    "heads": 2,
    "kv_heads": 1,
    "mlp_width": 32,
    "context": 32,
    "loss_chunk": 0,
}
TRAIN = {
    "steps": 2,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 0,
    "eval_rows": 4,
    "checkpoint_every": 0,
}


def config(data, **groups):
    fields = {"model": MODEL, "depth": {"policy": "expert_choice"}, "train": TRAIN} | groups
    return from_dict({"data": data, **fields})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    corpus = write_corpus(directory / "corpus")
    data = {
        "source": "files",
        "paths": (str(corpus),),
        "cache_dir": str(directory / "cache"),
        "tokenizer": "bytes",
    }
    train(config(data), directory / "run", progress=False)
    return directory, data


def chats(directory):
    path = directory / "chats.jsonl"

    def talk(i):
        return [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": f"{i + 1}."},
        ]

    path.write_text("".join(json.dumps({"messages": talk(i)}) + "\n" for i in range(40)))
    cache = str(directory / "cache")
    return {
        "source": "files",
        "format": "chat",
        "paths": (str(path),),
        "cache_dir": cache,
        "tokenizer": "bytes",
    }


def test_conversations_are_trained_on_from_the_weights_of_another_run(base, tmp_path):
    directory, _ = base
    cfg = config(chats(tmp_path), model=MODEL | {"context": 48}, train=TRAIN | {"steps": 30})
    summary = train(cfg, tmp_path / "run", progress=False, init_from=directory / "run")
    parent = load_model(directory / "run")
    assert summary["lineage"] == {"parent": str(directory / "run"), "step": 2, "data": parent.data}
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [r["lm_loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    assert summary["eval"]["tokens"] < summary["data"]["validation"]["tokens"], (
        "only replies are evaluated"
    )
    assert (
        find_template(tmp_path / "run").plain
        and (tmp_path / "run" / "chat_template.jinja").exists()
    )
    assert load_model(tmp_path / "run").lineage == summary["lineage"]


def test_the_first_step_is_one_from_those_very_weights(base, tmp_path):
    directory, data = base
    still = {"optim": {"peak_lr": 1e-12, "weight_decay": 0.0}}
    train(config(data, **still), tmp_path / "run", progress=False, init_from=directory / "run")
    old, new = load_model(directory / "run").params, load_model(tmp_path / "run").params

    # its survey moves by rule
    def drop(p):
        return {name: leaf for name, leaf in p.items() if name != "router"}

    for mine, theirs in zip(jax.tree.leaves(drop(new)), jax.tree.leaves(drop(old)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-9)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"model": MODEL | {"width": 32}}, "model.width 16 there, 32 here"),
        ({"model": MODEL | {"layers": 6}}, "model.layers 3 there, 6 here"),
        (
            {"depth": {"policy": "token_choice"}},
            "depth.policy 'expert_choice' there, 'token_choice' here",
        ),
        ({"data": {"tokenizer": "bpe", "bpe_vocab": 300}}, "vocab_size|another tokenizer"),
    ],
)
def test_weights_that_do_not_fit_are_refused(base, tmp_path, groups, said):
    directory, data = base
    cfg = config(data | groups.pop("data", {}), **groups)
    with pytest.raises(CheckpointError, match=f"--init_from=.*({said})"):
        train(cfg, tmp_path / "run", progress=False, init_from=directory / "run")


def test_a_run_goes_on_from_its_own_beginning_only(base, tmp_path):
    directory, data = base
    train(config(data), tmp_path / "run", progress=False, init_from=directory / "run")
    (tmp_path / "run" / "summary.json").unlink()
    more = config(data, train=TRAIN | {"steps": 3})
    again = train(more, tmp_path / "run", progress=False, allow=["train.steps"])
    assert again["steps"] == 3 and again["lineage"]["parent"] == str(directory / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"started from the weights of .*, not from elsewhere"
    ):
        train(more, tmp_path / "run", progress=False, init_from="elsewhere")
