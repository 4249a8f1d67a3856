"""Tiny models as Hugging Face writes them, with random weights, and what they compute in plain
numpy."""

import json
import math

import numpy as np
import tokenizers
from safetensors.numpy import save_file

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 384,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
    "smollm2": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama3": {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 16},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    },
    "qwen2-yarn": {
        "architectures": ["Qwen2ForCausalLM"],
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 12, "tie_word_embeddings": False},
}


def config_for(kind, **changes):
    return {**BASE, **ARCHITECTURES[kind], **changes}


def head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def tensors_for(config, seed=0):
    """Random weights, every name of the architecture."""
    rng = np.random.default_rng(seed)
    d, f, hd = config["hidden_size"], config["intermediate_size"], head_dim(config)
    heads, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    name = config["architectures"][0]

    def matrix(*shape):
        return rng.normal(0, 0.3, shape).astype(np.float32)

    def scale(size):
        return (1 + rng.normal(0, 0.2, size)).astype(np.float32)

    found = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], d),
        "model.norm.weight": scale(d),
    }
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = matrix(config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        found |= {
            f"{at}input_layernorm.weight": scale(d),
            f"{at}self_attn.q_proj.weight": matrix(heads, d),
            f"{at}self_attn.k_proj.weight": matrix(kv, d),
            f"{at}self_attn.v_proj.weight": matrix(kv, d),
            f"{at}self_attn.o_proj.weight": matrix(d, heads),
            f"{at}post_attention_layernorm.weight": scale(d),
            f"{at}mlp.gate_proj.weight": matrix(f, d),
            f"{at}mlp.up_proj.weight": matrix(f, d),
            f"{at}mlp.down_proj.weight": matrix(d, f),
        }
        if name == "Qwen2ForCausalLM":
            found |= {
                f"{at}self_attn.{p}_proj.bias": matrix(n)
                for p, n in (("q", heads), ("k", kv), ("v", kv))
            }
        if name == "Qwen3ForCausalLM":
            found |= {f"{at}self_attn.{p}_norm.weight": scale(hd) for p in "qk"}
    return found


def frequencies(config):
    """(angular frequencies [H / 2], factor on cos and sin)."""
    hd, theta = head_dim(config), config["rope_theta"]
    plain = 1.0 / theta ** (np.arange(0, hd, 2, dtype=np.float64) / hd)
    scaling = config.get("rope_scaling")
    if not scaling:
        return plain, 1.0
    kind, factor = scaling.get("rope_type") or scaling["type"], scaling["factor"]
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = original / scaling["low_freq_factor"], original / scaling["high_freq_factor"]
        out = []
        for f in plain:
            wave = 2 * math.pi / f
            if wave < high:
                out.append(f)
            elif wave > low:
                out.append(f / factor)
            else:
                smooth = (original / wave - scaling["low_freq_factor"]) / (
                    scaling["high_freq_factor"] - scaling["low_freq_factor"]
                )
                out.append((1 - smooth) * f / factor + smooth * f)
        return np.array(out), 1.0
    assert kind == "yarn"

    def dim(turns):
        return hd * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dim(32)), 0), min(math.ceil(dim(1)), hd - 1)
    ramp = np.clip((np.arange(hd // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), 0.1 * math.log(factor) + 1


def reference(config, w, ids):
    """float32 logits [T, V] of one sequence, written after the architectures' papers: rotate_half,
    repeated kv heads."""
    hd, heads, kv = head_dim(config), config["num_attention_heads"], config["num_key_value_heads"]
    eps, t = np.float32(config["rms_norm_eps"]), len(ids)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale

    frequency, magnitude = frequencies(config)
    angle = np.arange(t)[:, None] * frequency
    cos, sin = (
        np.concatenate([f(angle)] * 2, -1).astype(np.float32) * np.float32(magnitude)
        for f in (np.cos, np.sin)
    )

    def rotate(x):  # [T, heads, H]
        half = np.concatenate([-x[..., hd // 2 :], x[..., : hd // 2]], -1)
        return x * cos[:, None] + half * sin[:, None]

    x = w["model.embed_tokens.weight"][ids]
    mask = np.where(np.tril(np.ones((t, t), bool)), 0, -np.inf).astype(np.float32)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        n = norm(x, w[f"{at}input_layernorm.weight"])

        def project(p, count, n=n, at=at):
            y = n @ w[f"{at}self_attn.{p}_proj.weight"].T
            if f"{at}self_attn.{p}_proj.bias" in w:
                y = y + w[f"{at}self_attn.{p}_proj.bias"]
            y = y.reshape(t, count, hd)
            own = w.get(f"{at}self_attn.{p}_norm.weight")
            return y if own is None else norm(y, own)

        q, k, v = rotate(project("q", heads)), rotate(project("k", kv)), project("v", kv)
        k, v = (np.repeat(a, heads // kv, axis=1) for a in (k, v))
        s = np.einsum("qhd,khd->hqk", q, k) / np.float32(math.sqrt(hd)) + mask
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(t, -1) @ w[f"{at}self_attn.o_proj.weight"].T
        n = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate = n @ w[f"{at}mlp.gate_proj.weight"].T
        x = (
            x
            + (gate / (1 + np.exp(-gate)) * (n @ w[f"{at}mlp.up_proj.weight"].T))
            @ w[f"{at}mlp.down_proj.weight"].T
        )
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ head.T


def library_tokenizer():
    """Byte-level BPE with three special tokens and one added token, its words cut as SmolLM2's
    are."""
    pre, digits = (
        tokenizers.pre_tokenizers,
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
    )
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False)])
    hf.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    hf.train_from_iterator(["the cat sat on the mat and the hat, 12 times: 345"] * 3, trainer)
    hf.add_tokens([tokenizers.AddedToken("<tool>", special=False, normalized=False)])
    return hf


def write_hf(directory, config, tensors, *, shards=1, template=CHATML, settings=None):
    """A model directory; `shards` above 1 writes an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
        of = {name: files[i % shards] for i, name in enumerate(names)}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": of})
        )
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::shards]}, directory / file)
    (directory / "tokenizer.json").write_text(library_tokenizer().to_str())
    words = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
    }
    if template:
        words["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(words | (settings or {})))
    return directory
