"""Checkpoints as models of other tools, and back: every bit is the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file
from small import random_params
from weights.foreign import config_for, reference, tensors_for, write_hf
from weights.test_huggingface import logits_of

from mor_jax.config import Config, DepthConfig, ModelConfig
from mor_jax.data.tokenizer import train_bpe
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import CheckpointError
from mor_jax.model.lm import LM
from mor_jax.train.checkpoint import save_weights
from mor_jax.train.load import load_model
from mor_jax.weights.exporting import export_weights, unrolled
from mor_jax.weights.importing import import_weights

IDS = np.random.default_rng(2).integers(0, 250, 30)
SHAPE = {
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "mlp_width": 48,
    "vocab_size": 320,
    "context": 64,
    "init_std": 0.2,
}
RECURSIVE = {
    "plain": {"layers": 3},
    "cycle": {"layers": 6, "recursions": 3, "sharing": "cycle"},
    "sequence": {"layers": 6, "recursions": 3, "sharing": "sequence"},
    "middle": {"layers": 6, "recursions": 2, "sharing": "middle_cycle", "tied": False},
    "biases": {"layers": 4, "recursions": 2, "sharing": "cycle", "qkv_bias": True},
    "qk norm": {
        "layers": 4,
        "recursions": 2,
        "sharing": "cycle",
        "qk_norm": True,
        "rope_theta": 500.0,
    },
    "llama3": {
        "layers": 2,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_original_context": 16,
    },
    "yarn": {"layers": 2, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 16},
}


def saved(path, tokenizer=None, depth=None, **shape):
    """A run directory with random weights."""
    tokenizer = tokenizer or ByteTokenizer()
    config = Config(model=ModelConfig(**{**SHAPE, **shape}), depth=depth or DepthConfig())
    params = random_params(LM.from_config(config))
    meta = {"config": dataclasses.asdict(config), "tokenizer": tokenizer.to_json(), "data": ""}
    save_weights(path / "checkpoints", params, meta)
    return path


@pytest.mark.parametrize("kind", RECURSIVE)
def test_what_is_written_computes_the_same_here_and_elsewhere(kind, tmp_path):
    run = saved(tmp_path / "run", **RECURSIVE[kind])
    done = export_weights(run, f"hf:{tmp_path / 'hf'}")
    original = load_model(run)
    assert done.layers == original.lm.program.unrolled_layers
    import_weights(f"hf:{tmp_path / 'hf'}", tmp_path / "again")
    again = load_model(tmp_path / "again")
    for layer, (part, number) in enumerate(unrolled(original.config)):
        one, other = again.params["core"][str(layer)], original.params[part][number]
        jax.tree.map(np.testing.assert_array_equal, one, other)
    # The same bits in a program that is compiled in other pieces: sums may be rounded in another
    # order.
    np.testing.assert_allclose(logits_of(again, IDS), logits_of(original, IDS), atol=5e-5)
    config, tensors = (
        json.loads((tmp_path / "hf/config.json").read_text()),
        load_file(tmp_path / "hf/model.safetensors"),
    )
    np.testing.assert_allclose(
        reference(config, tensors, IDS), logits_of(original, IDS), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "smollm2"])
def test_published_weights_come_back_bit_for_bit(kind, tmp_path):
    config = config_for(kind)
    tensors = tensors_for(config)
    import_weights(f"hf:{write_hf(tmp_path / 'hf', config, tensors)}", tmp_path / "run")
    done = export_weights(tmp_path / "run", tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(done.files) > 2 and set(index["weight_map"]) == set(tensors)
    for file in done.files:
        for name, x in load_file(tmp_path / "out" / file).items():
            np.testing.assert_array_equal(x, tensors[name])
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {
        k: written[k]
        for k in config
        if k not in ("eos_token_id", "sliding_window") and k in written
    } == {
        k: v
        for k, v in config.items()
        if k not in ("eos_token_id", "sliding_window") and k in written
    }
    import_weights(f"hf:{tmp_path / 'out'}", tmp_path / "again")
    first, second = load_model(tmp_path / "run"), load_model(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert first.lm == second.lm and first.chat_template == second.chat_template
    assert first.tokenizer.to_json() == second.tokenizer.to_json()


@pytest.mark.parametrize(
    "words", [ByteTokenizer(), train_bpe(["the cat and the hat"] * 4, 300)], ids=["bytes", "bpe"]
)
def test_the_tokenizer_is_one_that_the_library_reads(words, tmp_path):
    run = saved(tmp_path / "run", words, layers=2)
    export_weights(run, tmp_path / "hf")
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    for text in ["the cat", "naïve 日本 \x00\n", ""]:
        assert hf.encode(text).ids == words.prompt(text)
        assert hf.decode(words.encode(text)) == text
    back = import_weights(f"hf:{tmp_path / 'hf'}", tmp_path / "again").tokenizer
    assert back.add_bos and (back.bos, back.eos, back.ends) == (words.bos, words.eos, words.ends)


def test_what_no_published_architecture_computes_is_refused(tmp_path):
    recursive = {"layers": 4, "recursions": 2, "sharing": "cycle"}
    for name, shape, match in [
        ("routed", {**recursive, "depth": DepthConfig("expert_choice")}, "expert_choice"),
        ("cap", {"layers": 2, "logit_cap": 30.0}, "logit_cap"),
        ("own", {**recursive, "norms": "own"}, "norms"),
        ("shared keys", {**recursive, "depth": DepthConfig(kv="shared")}, "shared"),
    ]:
        run = saved(tmp_path / name, **shape)
        with pytest.raises(CheckpointError, match=match):
            export_weights(run, tmp_path / "hf", remote_code=False)
    assert not (tmp_path / "hf").exists()
    run = saved(tmp_path / "fine", layers=2)
    export_weights(run, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="already holds"):
        export_weights(run, tmp_path / "hf")


def test_weights_are_not_written_over_a_checkpoint(tmp_path):
    run = saved(tmp_path / "run", layers=2)
    with pytest.raises(CheckpointError, match="already holds"):
        saved(run, layers=2)
    with pytest.raises(CheckpointError, match="meta lacks data"):
        save_weights(tmp_path / "other", {}, {"config": {}, "tokenizer": ""})
