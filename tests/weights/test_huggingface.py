"""Published weights in safetensors: what is read computes what an independent forward pass
computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights.foreign import (
    ARCHITECTURES,
    CHATML,
    config_for,
    library_tokenizer,
    reference,
    tensors_for,
    write_hf,
)

from mor_jax.data.chat import ChatTemplate
from mor_jax.errors import CheckpointError, UserError
from mor_jax.inference.generate import Generation
from mor_jax.inference.sampler import Sampling
from mor_jax.inference.text import stream_text
from mor_jax.model import block
from mor_jax.train.load import load_model
from mor_jax.weights.importing import import_weights

IDS = np.random.default_rng(1).integers(0, 299, 40)


def logits_of(loaded, ids):
    """[T, V] of the forward pass in training."""
    tokens = jnp.asarray(ids, jnp.int32)[None]
    with jax.set_mesh(loaded.mesh):
        out = loaded.lm.forward(loaded.params, tokens, jnp.ones_like(tokens), mode="causal")
        return np.asarray(block.head(loaded.lm.model, loaded.params, out.h_BxTxD))[0]


def imported(tmp_path, config, tensors, **how):
    directory = write_hf(tmp_path / "hf", config, tensors, **how)
    import_weights(f"hf:{directory}", tmp_path / "run")
    return load_model(tmp_path / "run")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_those_of_an_independent_forward_pass(kind, tmp_path):
    config = config_for(kind)
    tensors = tensors_for(config)
    loaded = imported(tmp_path, config, tensors, shards=1 + (kind == "llama") * 2)
    expected = reference(config, tensors, IDS)
    # Sums of 48 float32 products in another order; logits are of size 10.
    np.testing.assert_allclose(logits_of(loaded, IDS), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["smollm2", "qwen2", "qwen3"])
def test_greedy_text_is_equal_through_plain_decode_and_engine(kind, tmp_path):
    config = config_for(kind, eos_token_id=299)  # never drawn below: the loop would end
    tensors = tensors_for(config)
    loaded = imported(tmp_path, config, tensors, settings={"eos_token": None})
    ids, vocab = loaded.tokenizer.prompt("the cat"), loaded.tokenizer.vocab_size
    plain, expected = [], list(ids)
    for token in Generation(loaded.lm, loaded.params, [ids], max_tokens=12, vocab_size=vocab):
        plain.append(int(token.token_B[0]))
    for _ in range(12):
        expected.append(int(np.argmax(reference(config, tensors, expected)[-1, :vocab])))
    assert plain == expected[len(ids) :]
    cut = next((i for i, t in enumerate(plain) if t in loaded.tokenizer.ends), len(plain))
    text = "".join(
        p.text for p in stream_text(loaded, "the cat", max_tokens=12, sampling=Sampling(0.0))
    )
    assert text == loaded.tokenizer.decode([*ids, *plain[:cut]])


def test_halves_are_read(tmp_path):
    """bfloat16, which numpy does not have, and float16."""
    config = config_for("smollm2")
    tensors = tensors_for(config)
    directory = write_hf(tmp_path / "hf", config, tensors)
    rounded = {
        name: (x.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, x in tensors.items()
    }
    _write_raw(
        directory / "model.safetensors",
        {n: ("BF16", (x.view(np.uint32) >> 16).astype("<u2")) for n, x in rounded.items()},
    )
    import_weights(f"hf:{directory}", tmp_path / "run")
    expected = reference(config, rounded, IDS)
    np.testing.assert_allclose(
        logits_of(load_model(tmp_path / "run"), IDS), expected, atol=2e-4, rtol=1e-4
    )
    half = {name: x.astype(np.float16) for name, x in tensors.items()}
    loaded = imported(tmp_path / "half", config, half)
    full = {name: x.astype(np.float32) for name, x in half.items()}
    np.testing.assert_allclose(
        logits_of(loaded, IDS), reference(config, full, IDS), atol=2e-4, rtol=1e-4
    )


def _write_raw(path, tensors):
    header, data = {}, b""
    for name, (dtype, x) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(x.shape),
            "data_offsets": [len(data), len(data) + x.nbytes],
        }
        data += x.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_checkpoint_carries_tokenizer_template_ends_and_the_rule_of_bos(tmp_path):
    config = config_for("smollm2")
    loaded = imported(tmp_path, config, tensors_for(config))
    t = loaded.tokenizer
    assert t.eos == 2 and t.bos == 1 and t.ends == {0, 2} and not t.add_bos
    text = "the cat, 12 ½ ³ <tool>"
    assert t.prompt(text) == library_tokenizer().encode(text, add_special_tokens=False).ids
    assert t.prompt("") == [1]  # a model must read something
    assert (
        loaded.chat_template == CHATML
        and (tmp_path / "run/chat_template.jinja").read_text() == CHATML
    )
    (tmp_path / "run/chat_template.jinja").unlink()
    (tmp_path / "run/tokenizer.json").unlink()
    assert load_model(tmp_path / "run/checkpoints").template.source == CHATML
    ids = loaded.template.ids(t, [{"role": "user", "content": "the <|im_end|> cat"}])
    assert ids[0] == 1 and ids.count(2) == 1 and loaded.template.stop_tokens(t) == {0, 2}


def test_a_tokenizer_that_puts_bos_first_is_asked_to(tmp_path):
    config = config_for("llama")
    directory = write_hf(tmp_path / "hf", config, tensors_for(config), template=None)
    hf = library_tokenizer()
    hf.post_processor = __import__("tokenizers").processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
    )
    (directory / "tokenizer.json").write_text(hf.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 17]}))
    done = import_weights(f"hf:{directory}", tmp_path / "run")
    assert done.tokenizer.add_bos and done.tokenizer.ends == {0, 2, 17} and done.template.plain
    assert done.tokenizer.prompt("cat")[0] == 1
    messages = [{"role": "user", "content": "hi"}]
    assert ChatTemplate().ids(load_model(tmp_path / "run").tokenizer, messages)[0] == 1


def test_added_tokens_beside_the_tokenizer_are_added(tmp_path):
    config = config_for("smollm2")
    size = library_tokenizer().get_vocab_size()
    directory = write_hf(
        tmp_path / "hf",
        config,
        tensors_for(config),
        settings={
            "added_tokens_decoder": {
                "0": {"content": "<|endoftext|>", "special": True},
                str(size): {"content": "<|end|>", "special": True},
            }
        },
    )
    t = import_weights(f"hf:{directory}", tmp_path / "run").tokenizer
    assert t.specials["<|end|>"] == size and size in t.ends


CASES = {
    "architecture": ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "rope": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "rope key": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "mscale"),
    "vocabulary": ({"vocab_size": 100}, "model.embed_tokens.weight"),
    "heads": ({"num_key_value_heads": 4}, "k_proj"),
    "layers": ({"num_hidden_layers": 4}, "model.layers.3."),
    "fewer layers": ({"num_hidden_layers": 2}, "model.layers.2."),
    "no number": ({"hidden_size": None}, "hidden_size"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_understood_is_named_and_refused(case, tmp_path):
    changes, names = CASES[case]
    config = config_for("smollm2")
    directory = write_hf(tmp_path / "hf", config, tensors_for(config))
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=names):
        import_weights(f"hf:{directory}", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tensor_is_named_and_buffers_are_passed_over(tmp_path):
    config = config_for("llama")
    tensors = tensors_for(config) | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)
    }
    imported(tmp_path / "good", config, tensors)
    for name in ("model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.q_norm.weight"):
        directory = write_hf(tmp_path / name, config, tensors | {name: np.ones(32, np.float32)})
        with pytest.raises(CheckpointError, match=name):
            import_weights(f"hf:{directory}", tmp_path / "run")


def test_a_tied_head_may_be_stored_and_must_be_the_table(tmp_path):
    config = config_for("smollm2")
    tensors = tensors_for(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    imported(tmp_path / "same", config, tensors)
    tensors["lm_head.weight"][0, 0] += 1
    directory = write_hf(tmp_path / "other", config, tensors)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        import_weights(f"hf:{directory}", tmp_path / "run")


def test_a_shard_that_is_missing_or_torn_is_named(tmp_path):
    config = config_for("llama")
    directory = write_hf(tmp_path / "hf", config, tensors_for(config), shards=2)
    part = directory / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        import_weights(f"hf:{directory}", tmp_path / "run")
    part.unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002"):
        import_weights(f"hf:{directory}", tmp_path / "run")


def test_the_context_stays_within_a_sliding_window(tmp_path):
    config = config_for("mistral", sliding_window=32)
    directory = write_hf(tmp_path / "hf", config, tensors_for(config))
    assert import_weights(f"hf:{directory}", tmp_path / "run").config.model.context == 32
    with pytest.raises(CheckpointError, match="window of 32"):
        import_weights(f"hf:{directory}", tmp_path / "other", context=48)


@pytest.mark.parametrize("package", ["safetensors", "gguf"])
def test_a_missing_package_is_one_line(package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    source = "hf:nowhere" if package == "safetensors" else "nowhere.gguf"
    with pytest.raises(UserError, match=rf'{package}: pip install "\.\[weights\]"'):
        import_weights(source, tmp_path / "run")
