"""The model of lm-eval: its figures are those of the full forward pass, and a task of one's own
runs through it."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small import random_params, small_lm

from mor_jax.config import Config, MeshConfig
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.load import Loaded

pytest.importorskip("lm_eval")
from mor_jax.train import harness


@pytest.fixture(scope="module")
def loaded():
    lm = small_lm(
        "mor",
        width=16,
        heads=2,
        kv_heads=1,
        mlp_width=24,
        context=16,
        vocab_size=320,
        layers=4,
        recursions=2,
    )
    cfg = Config(model=lm.model, depth=lm.depth)
    return Loaded(
        lm, random_params(lm), ByteTokenizer(), cfg, 0, "", make_mesh(MeshConfig(data=-1))
    )


@pytest.fixture(scope="module")
def model(loaded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "load_model", lambda *_, **__: loaded)
        return harness.MorLM("somewhere", batch_size=1, device="cpu")


def log_probs(loaded, ids):
    """Of ids[1:], by the full causal forward pass over what the tokenizer knows."""
    logits = loaded.lm.apply(loaded.params, np.asarray([ids], np.int32), mode="causal")[
        0, :-1, :258
    ]
    table = np.asarray(jax.nn.log_softmax(logits))
    return table[np.arange(len(ids) - 1), ids[1:]], table.argmax(-1)


def ask(*arguments):
    return SimpleNamespace(args=arguments)


def test_scores_are_those_of_the_full_forward_pass(loaded, model):
    bos = ByteTokenizer().bos
    best = int(log_probs(loaded, [bos, 97, 98])[1][-1])
    asked = [("ab", "cd"), ("", "xyz"), ("0123456789", "abcdefgh")]
    found = model.loglikelihood([ask(*pair) for pair in asked], disable_tqdm=True)
    rows = [[97, 98, 99, 100], [bos, *b"xyz"], [*b"0123456789abcdefgh"][-16:]]
    for (score, greedy), row, (_, continuation) in zip(found, rows, asked, strict=True):
        own, top = log_probs(loaded, row)
        n = len(continuation)
        assert score == pytest.approx(float(own[-n:].sum()), abs=1e-4)
        assert greedy == (list(top[-n:]) == row[-n:])
    [(_, greedy)] = model._loglikelihood_tokens([(None, [bos, 97], [best])])
    assert greedy == (int(log_probs(loaded, [bos, 97, best])[1][-1]) == best)


def test_rolling_counts_every_token_once(loaded, model):
    """25 tokens in windows of 15: each is predicted from at least the token before it."""
    text = "a text that is longer yet"
    ids = [ByteTokenizer().bos, *text.encode()]
    [total] = model.loglikelihood_rolling([ask(text)])
    want = log_probs(loaded, ids[:16])[0].sum() + log_probs(loaded, ids[10:26])[0][5:].sum()
    assert total == pytest.approx(float(want), abs=1e-3)


def test_a_task_of_ones_own_runs(model, loaded, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    texts = ["some text", "other words"]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'lines.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    done = simple_evaluate(
        model, tasks=["mine"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
    )
    nll = -sum(log_probs(loaded, [256, *t.encode()])[0].sum() for t in texts)
    found = done["results"]["mine"]["bits_per_byte,none"]
    assert found == pytest.approx(nll / np.log(2) / sum(map(len, texts)), rel=1e-5)


def test_generation_is_the_engines(model):
    settings = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    both = model.generate_until([ask("ab", settings), ask("b", settings | {"max_gen_toks": 2})])
    again = model.generate_until([ask("b", settings | {"max_gen_toks": 2}), ask("ab", settings)])
    assert both == again[::-1]
