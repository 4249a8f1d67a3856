"""Weights in GGUF files, written here by the format's own library: types, the permuted rows,
tokenizer, refusals."""

import gguf
import numpy as np
import pytest
from weights.foreign import CHATML, config_for, head_dim, library_tokenizer, reference, tensors_for
from weights.test_huggingface import IDS, logits_of

from mor_jax.errors import CheckpointError
from mor_jax.train.load import load_model
from mor_jax.weights.gguf_file import INNER, TOP
from mor_jax.weights.importing import import_weights

F32, F16, BF16, Q8_0, Q4_0, Q4_1 = (
    getattr(gguf.GGMLQuantizationType, name)
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
)
ARCHES = {
    "smollm2": "llama",
    "llama": "llama",
    "llama3": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}


def gguf_name(name):
    stem, _, end = name.rpartition(".")
    for theirs, ours in TOP.items():
        if stem == ours:
            return f"{theirs}.{end}"
    layer, inner = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{next(theirs for theirs, ours in INNER.items() if ours == inner)}.{end}"


def permuted(x, heads):
    """Rows in the order that llama.cpp's rotation of neighbours reads."""
    return (
        x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    )


def write_gguf(
    path, config, tensors, *, arch, kind=F32, permute=True, words="smollm", extra=(), meta=()
):
    """The file, and the tensors as they are after de-quantisation."""
    w = gguf.GGUFWriter(str(path), arch)
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_key_length(head_dim(config))
    w.add_value_length(head_dim(config))
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_theta"])
    hf = library_tokenizer()
    names = [hf.id_to_token(i) for i in range(hf.get_vocab_size())]
    import json

    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(words)
    w.add_token_list(names)
    w.add_token_types(
        [3 if i < 3 else 4 if name == "<tool>" else 1 for i, name in enumerate(names)]
    )
    w.add_token_merges([" ".join(pair) for pair in json.loads(hf.to_str())["model"]["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_add_bos_token(False)
    w.add_chat_template(CHATML)
    for add, key, value in meta:
        getattr(w, add)(key, value)
    read = {}
    for name, x in {**tensors, **dict(extra)}.items():
        stored, read[name] = x, x
        if arch == "llama" and permute and (".q_proj." in name or ".k_proj." in name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            stored = permuted(x, heads)
        as_type = kind if x.ndim == 2 else F32
        raw = gguf.quants.quantize(stored, as_type)
        w.add_tensor(
            gguf_name(name) if name.startswith(("model.", "lm_head")) else name,
            raw,
            raw_dtype=as_type,
        )
        back = gguf.quants.dequantize(raw, as_type).astype(np.float32).reshape(x.shape)
        if stored is not x:
            back = (
                back.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
                .swapaxes(1, 2)
                .reshape(x.shape)
            )
        read[name] = back
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return read


@pytest.mark.parametrize("kind", ["smollm2", "llama", "qwen2", "qwen3"])
def test_every_architecture_computes_what_an_independent_forward_pass_does(kind, tmp_path):
    config = config_for(kind)
    read = write_gguf(tmp_path / "m.gguf", config, tensors_for(config), arch=ARCHES[kind])
    import_weights(tmp_path / "m.gguf", tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    np.testing.assert_allclose(
        logits_of(loaded, IDS), reference(config, read, IDS), atol=2e-4, rtol=1e-4
    )
    assert loaded.lm.model.norm_eps == config["rms_norm_eps"]  # the file holds it as float32


@pytest.mark.parametrize("kind", [F16, BF16, Q8_0, Q4_0, Q4_1], ids=lambda kind: kind.name)
def test_every_type_is_de_quantised(kind, tmp_path):
    # blocks of 32 along a row
    config = config_for("smollm2", hidden_size=64, intermediate_size=96, head_dim=16)
    tensors = tensors_for(config)
    read = write_gguf(tmp_path / "m.gguf", config, tensors, arch="llama", kind=kind)
    assert any(not np.array_equal(read[name], tensors[name]) for name in tensors)
    import_weights(tmp_path / "m.gguf", tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    np.testing.assert_allclose(
        logits_of(loaded, IDS), reference(config, read, IDS), atol=4e-4, rtol=1e-4
    )


def test_rows_of_the_llama_architecture_are_permuted_and_others_are_not(tmp_path):
    """A file written without the permutation must come out wrong, so the test above does see it."""
    config = config_for("smollm2")
    read = write_gguf(tmp_path / "m.gguf", config, tensors_for(config), arch="llama", permute=False)
    import_weights(tmp_path / "m.gguf", tmp_path / "run")
    gap = np.abs(logits_of(load_model(tmp_path / "run"), IDS) - reference(config, read, IDS)).max()
    assert gap > 0.1


def test_the_tokenizer_in_the_file_is_built(tmp_path):
    config = config_for("smollm2")
    write_gguf(tmp_path / "m.gguf", config, tensors_for(config), arch="llama")
    t = import_weights(tmp_path / "m.gguf", tmp_path / "run").tokenizer
    hf = library_tokenizer()
    hf.encode_special_tokens = True
    for text in [
        "the cat sat",
        " 12 times: 345",
        "naïve ½ ³ ٣ 日本",
        "<tool> <|im_end|> x",
        "  \n\n a",
    ]:
        assert t.encode(text) == hf.encode(text, add_special_tokens=False).ids
        assert t.decode(t.encode(text)) == text
    loaded = load_model(tmp_path / "run")
    assert (
        loaded.tokenizer.ends == {0, 2}
        and not loaded.tokenizer.add_bos
        and loaded.chat_template == CHATML
    )


def test_llama_3s_scaling_is_known_by_its_factors(tmp_path):
    config = config_for("llama3")
    scaling = config["rope_scaling"]
    from weights.foreign import frequencies

    plain = config["rope_theta"] ** -(np.arange(0, head_dim(config), 2) / head_dim(config))
    factors = (plain / frequencies(config)[0]).astype(np.float32)
    original = (
        "add_uint32",
        "llama.rope.scaling.original_context_length",
        scaling["original_max_position_embeddings"],
    )
    how = {"arch": "llama", "meta": [original]}
    read = write_gguf(
        tmp_path / "m.gguf",
        config,
        tensors_for(config),
        extra={"rope_freqs.weight": factors},
        **how,
    )
    import_weights(tmp_path / "m.gguf", tmp_path / "run")
    np.testing.assert_allclose(
        logits_of(load_model(tmp_path / "run"), IDS),
        reference(config, read, IDS),
        atol=2e-4,
        rtol=1e-4,
    )
    write_gguf(
        tmp_path / "o.gguf",
        config,
        tensors_for(config),
        extra={"rope_freqs.weight": factors * 1.1},
        **how,
    )
    with pytest.raises(CheckpointError, match="rope_freqs"):
        import_weights(tmp_path / "o.gguf", tmp_path / "other")


def test_what_is_not_understood_is_named_and_refused(tmp_path):
    config = config_for("smollm2")
    tensors = tensors_for(config)
    for name, how, match in [
        ("arch", {"arch": "gemma3"}, "gemma3"),
        (
            "tensor",
            {"arch": "llama", "extra": {"blk.0.ffn_gate_inp.weight": np.ones((4, 32), np.float32)}},
            "gate_inp",
        ),
        (
            "experts",
            {"arch": "llama", "meta": [("add_uint32", "llama.expert_count", 8)]},
            "expert_count",
        ),
        ("words", {"arch": "llama", "words": "deepseek-llm"}, "--tokenizer"),
        (
            "rotary",
            {"arch": "llama", "meta": [("add_uint32", "llama.rope.dimension_count", 4)]},
            "dimension_count",
        ),
    ]:
        write_gguf(tmp_path / f"{name}.gguf", config, tensors, **how)
        with pytest.raises(CheckpointError, match=match):
            import_weights(tmp_path / f"{name}.gguf", tmp_path / "run")
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "arch.gguf").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"torn\.gguf"):
        import_weights(tmp_path / "torn.gguf", tmp_path / "run")
    # the way out for unknown words
    (tmp_path / "tokenizer.json").write_text(library_tokenizer().to_str())
    done = import_weights(
        tmp_path / "words.gguf", tmp_path / "run", tokenizer=tmp_path / "tokenizer.json"
    )
    assert done.tokenizer.ends == {0, 2}
