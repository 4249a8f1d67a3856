"""A GGUF file: llama.cpp's container of weights (often quantised), configuration, tokenizer and
chat template.

Two conventions are undone here. Shapes are stored in reverse. And files of architecture `llama`
(Llama, Mistral, SmolLM2) hold the rows of the query and key projections in the order of a rotation
of neighbouring pairs (2i, 2i + 1); this project, as Hugging Face, rotates the first half of a head
against the second. Files of `qwen2` and `qwen3` are not permuted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.data.bpe import BpeTokenizer
from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import CheckpointError
from mor_jax.paths import as_path, is_local
from mor_jax.weights.families import Place, model_of, plain_places
from mor_jax.weights.source import framing_of, library_tokenizer, needed

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PERMUTED = ("llama",)
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The factors by which Llama 3's scaling divides frequencies; the file holds them and not what they
# are made of.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Keys that may be there and change nothing, by the part after the architecture's name, and values
# that are fine.
INERT: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (1.0, 0.0),
    "embedding_scale": (1.0, 0.0),
    "residual_scale": (1.0, 0.0),
}
CHUNK = 1 << 20  # elements that are de-quantised at once
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens

_WORDS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPLITS = ("smollm", "gpt-2", *_WORDS)  # ways of cutting text into words, `tokenizer.ggml.pre`


class Gguf:
    """Reads such a file, mapped into memory and de-quantised tensor by tensor.

    Raises:
      CheckpointError: no such file, damaged, or an architecture or a setting that this project does
        not have.
    """

    def __init__(self, path: str, *, context: int = 0):
        gguf = needed("gguf", "reading GGUF files")
        self.where = str(path)
        file = as_path(path)
        if not is_local(file) or not file.is_file():
            raise CheckpointError(f"{path} is not a file of this machine.")
        try:
            reader = gguf.GGUFReader(str(file))
        except Exception as e:  # the library raises whatever it stumbles over
            raise CheckpointError(
                f"{path} cannot be read as GGUF ({str(e)[:200] or type(e).__name__})."
            ) from e
        self._reader, self._dequantize = reader, gguf.quants.dequantize
        self._tensors = {t.name: t for t in reader.tensors}
        self._arch = str(self._get("general.architecture") or "")
        self._kv_names = {_hf_name(name): name for name in self._tensors if name != ROPE_FACTORS}
        self.model: ModelConfig = model_of(self._config(), self.where, context)
        self.depth = DepthConfig()
        template = self._get("tokenizer.chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None

    def places(self) -> dict[str, Place]:
        return plain_places(self.model)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            hf: tuple(int(n) for n in reversed(self._tensors[name].shape))
            for hf, name in self._kv_names.items()
        }

    def read(self, name: str) -> np.ndarray:
        stored = self._tensors[self._kv_names[name]]
        shape = self.shapes()[name]
        x = np.empty(shape, np.float32)
        # the library needs several arrays of the size of its result
        step = max(1, CHUNK // max(1, x[:1].size))
        try:
            for i in range(0, len(x), step):
                part = stored.data[i : i + step]
                x[i : i + step] = self._dequantize(part, stored.tensor_type).reshape(
                    x[i : i + step].shape
                )
        except NotImplementedError:
            raise CheckpointError(
                f"{self.where}: the tensor {stored.name} is of type {stored.tensor_type.name}, which cannot be read."
            ) from None
        if self._arch in PERMUTED and (heads := self._heads_of(name)):
            half = self.model.dims[2] // 2
            x = x.reshape(heads, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        return x

    def tokenizer(self, path: str | os.PathLike[str] = "") -> Tokenizer:
        if path:
            return self._framed(library_tokenizer(path))
        kind, words = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre")
        if kind != "gpt2" or words not in SPLITS:
            raise CheckpointError(
                f"{self.where}: its tokenizer ({kind}, {words}) cannot be built from the file; those that can are gpt2 with "
                f"{', '.join(SPLITS)}. Give the model's tokenizer.json with --tokenizer."
            )
        tokens = list(map(str, self._get("tokenizer.ggml.tokens") or ()))
        kinds = list(self._get("tokenizer.ggml.token_type") or ())
        pairs = [str(pair).split(" ", 1) for pair in self._get("tokenizer.ggml.merges") or ()]
        try:
            merges = [(left, right) for left, right in pairs]
            model = models.BPE(
                {t: i for i, t in enumerate(tokens)}, merges, ignore_merges=words == "llama-bpe"
            )
        except Exception as e:  # the library raises bare Exception
            raise CheckpointError(f"{self.where}: its tokenizer is damaged ({e}).") from e
        hf = tokenizers.Tokenizer(model)
        hf.pre_tokenizer = _pre_tokenizer(words)
        if words == "qwen2":
            hf.normalizer = normalizers.NFC()
        hf.decoder = decoders.ByteLevel()
        added = {
            kind: [t for t, k in zip(tokens, kinds, strict=False) if k == kind]
            for kind in (CONTROL, USER_DEFINED)
        }
        hf.add_special_tokens(
            [tokenizers.AddedToken(t, special=True, normalized=False) for t in added[CONTROL]]
        )
        hf.add_tokens(
            [tokenizers.AddedToken(t, special=False, normalized=False) for t in added[USER_DEFINED]]
        )
        return self._framed(hf)

    def _framed(self, hf: tokenizers.Tokenizer) -> Tokenizer:
        """A tokenizer with what the file says of beginnings and ends."""
        ids = {
            name: self._get(f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos", "eot", "eom")
        }
        add_bos = self._get("tokenizer.ggml.add_bos_token")
        if add_bos is None:  # llama.cpp's own rule
            add_bos = (
                self._get("tokenizer.ggml.model") == "llama"
                or self._get("tokenizer.ggml.pre") == "llama-bpe"
            )
        ends = [int(ids[name]) for name in ("eos", "eot", "eom") if ids[name] is not None]
        bos = None if ids["bos"] is None else int(ids["bos"])
        return BpeTokenizer(hf, self.where, framing_of(hf, bos, ends, bool(add_bos), self.where))

    def _heads_of(self, name: str) -> int:
        """Heads of a query or key projection, 0 of any other tensor."""
        found = re.search(r"self_attn\.([qk])_proj\.", name)
        heads, kv_heads, _ = self.model.dims
        return 0 if found is None else heads if found[1] == "q" else kv_heads

    def _get(self, key: str) -> Any:
        field = self._reader.fields.get(key)
        return None if field is None else field.contents()

    def _config(self) -> dict[str, object]:
        """What a config.json would say."""
        arch, where = self._arch, self.where
        if arch not in ARCHITECTURES:
            raise CheckpointError(
                f"{where}: the architecture {arch!r} cannot be read. Those that can: {', '.join(ARCHITECTURES)}."
            )
        own = {
            key.removeprefix(f"{arch}."): self._get(key)
            for key in self._reader.fields
            if key.startswith(f"{arch}.")
        }
        for key, fine in INERT.items():
            if own.get(key) not in (None, *fine):
                raise CheckpointError(f"{where}: {arch}.{key} = {own[key]!r} is not supported.")
        missing = [
            k
            for k in ("block_count", "embedding_length", "attention.head_count")
            if own.get(k) is None
        ]
        table = self._tensors.get("token_embd.weight")
        if missing or table is None:
            raise CheckpointError(
                f"{where}: {missing[0] if missing else 'the tensor token_embd.weight'} is missing."
            )
        heads = _one(own, "attention.head_count", where)
        head_dim = own.get("attention.key_length") or own["embedding_length"] // heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if own.get(key) not in (None, head_dim):
                raise CheckpointError(
                    f"{where}: {arch}.{key} = {own[key]} must be the head dimension, {head_dim}."
                )
        config: dict[str, object] = {
            "architectures": [ARCHITECTURES[arch]],
            "num_hidden_layers": own["block_count"],
            "hidden_size": own["embedding_length"],
            "num_attention_heads": heads,
            "num_key_value_heads": _one(own, "attention.head_count_kv", where)
            if "attention.head_count_kv" in own
            else heads,
            "head_dim": head_dim,
            "intermediate_size": _one(own, "feed_forward_length", where),
            "vocab_size": int(table.shape[1]),
            "max_position_embeddings": own.get("context_length"),
            "rms_norm_eps": _short(own.get("attention.layer_norm_rms_epsilon", 1e-6)),
            "rope_theta": _short(own.get("rope.freq_base", 10_000.0)),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            # Of llama and qwen3 both exist.
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
        }
        if own.get("attention.sliding_window"):
            config |= {
                "sliding_window": own["attention.sliding_window"],
                "use_sliding_window": True,
            }
            if arch == "llama":
                config["architectures"] = ["MistralForCausalLM"]
        return config | self._rope(own, int(head_dim))

    def _rope(self, own: Mapping[str, Any], head_dim: int) -> dict[str, object]:
        kind = own.get("rope.scaling.type") or "none"
        original = own.get("rope.scaling.original_context_length")
        if ROPE_FACTORS in self._tensors:
            return {
                "rope_scaling": self._llama3(
                    float(own.get("rope.freq_base", 10_000.0)), original, head_dim
                )
            }
        if kind == "none":
            if own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)) not in (0.0, 1.0):
                kind = "linear"
            else:
                return {}
        scaling: dict[str, object] = {
            "rope_type": kind,
            "factor": _short(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0))),
        }
        if original:
            scaling["original_max_position_embeddings"] = original
        for ours, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := own.get(f"rope.scaling.{key}")) is not None:
                scaling[ours] = _short(value)
        for key in ("attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor"):
            if own.get(f"rope.scaling.{key}") not in (None, 1.0, 0.0):
                raise CheckpointError(
                    f"{self.where}: {self._arch}.rope.scaling.{key} is not supported."
                )
        return {"rope_scaling": scaling}

    def _llama3(self, theta: float, original: int | None, head_dim: int) -> dict[str, object]:
        """Llama 3's scaling, from the factors the file divides its frequencies by."""
        stored = np.asarray(self._tensors[ROPE_FACTORS].data, np.float64).reshape(-1)
        original, factor = original or 8192, float(stored.max())
        turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
        low, high = LLAMA3.values()
        kept = np.clip((turns - low) / (high - low), 0, 1)
        if stored.shape != turns.shape or not np.allclose(
            1 / ((1 - kept) / factor + kept), stored, rtol=1e-3
        ):
            raise CheckpointError(
                f"{self.where}: the factors in {ROPE_FACTORS} are not those of Llama 3's scaling with an original context "
                f"of {original}, so they cannot be kept."
            )
        return {
            "rope_type": "llama3",
            "factor": factor,
            "original_max_position_embeddings": original,
            **LLAMA3,
        }


def _hf_name(name: str) -> str:
    """The tensor's name in Hugging Face's files; the same name where there is none."""
    stem, _, end = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{end}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    return (
        f"model.layers.{layer[1]}.{INNER[layer[2]]}.{end}" if layer and layer[2] in INNER else name
    )


def _pre_tokenizer(words: str) -> Any:
    """How text is cut into words, as Hugging Face's tokenizer of the same model does it."""
    if words in _WORDS:
        cut = pre_tokenizers.Split(tokenizers.Regex(_WORDS[words]), "isolated")
        return pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if words == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return plain


def _one(own: Mapping[str, Any], key: str, where: str) -> int:
    """A number that may be given for each layer. Raises CheckpointError: they differ."""
    value = own.get(key)
    if isinstance(value, list) and value:
        if len(set(value)) > 1:
            raise CheckpointError(f"{where}: {key} differs between layers, which is not supported.")
        value = value[0]
    if not isinstance(value, int):
        raise CheckpointError(f"{where}: {key} must be a whole number, got {json.dumps(value)}.")
    return value


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
