"""The published architectures whose block is this project's: their configurations, and where their
tensors go.

Everything here is in the names of Hugging Face's `config.json` and safetensors files; other formats
are translated to them (`gguf_file`). Letters: D width, N query heads, K kv heads, G = N / K, H head
dim, F mlp width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

from mor_jax.config import ModelConfig
from mor_jax.config.check_model import check_model
from mor_jax.errors import CheckpointError, ConfigError

Json = Mapping[str, object]
Index = EllipsisType | tuple[slice | int, ...]


class Family(NamedTuple):
    """What an architecture fixes, and what it takes for keys that its configuration leaves out."""

    kind: str  # `model_type`
    qkv_bias: bool | None  # None: as `attention_bias` says
    qk_norm: bool
    context: int
    window: int | None = None  # sliding window where the key is missing
    head_dim: int = 0  # 0: width / heads
    kv_heads: bool = True  # whether the number of kv heads must be given


FAMILIES = {
    "LlamaForCausalLM": Family("llama", None, False, 2048, kv_heads=False),
    "MistralForCausalLM": Family("mistral", False, False, 131_072, window=4096),
    "Qwen2ForCausalLM": Family("qwen2", True, False, 32_768),
    "Qwen3ForCausalLM": Family("qwen3", None, True, 32_768, head_dim=128),
}
# Keys that would change the arithmetic, and the values that do not.
INERT: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logits_scaling": (1,),
    "attention_multiplier": (None,),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "num_local_experts": (None, 0),
}
# Keys of a scaling of the rotary embedding, and the field that each is.
ROPE = {
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_context",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
    },
    "yarn": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_context",
        "beta_slow": "rope_beta_slow",
        "beta_fast": "rope_beta_fast",
        "attention_factor": "rope_attention_factor",
    },
}


def model_of(config: Json, where: str, context: int = 0) -> ModelConfig:
    """The shape that a `config.json` describes.

    Args:
      context: longest sequence; 0: the model's own. Where attention slides over a window, at most
        the window, within which it is the ordinary one.
    Raises:
      CheckpointError: an architecture or a setting that this project's block does not have.
    """
    names = config.get("architectures") or ()
    name = names[0] if isinstance(names, Sequence) and names else None
    if name not in FAMILIES:
        raise CheckpointError(
            f"{where}: the architecture {name or 'is not named, so it'!s} cannot be read. Those that can: "
            f"{', '.join(FAMILIES)}."
        )
    family = FAMILIES[name]
    for key, fine in INERT.items():
        if key in config and config[key] not in fine:
            raise CheckpointError(
                f"{where}: {key} = {config[key]!r} is not supported; {name} must have {fine[0]!r}."
            )
    heads = _int(config, "num_attention_heads", where)
    kv_heads = heads
    if config.get("num_key_value_heads") is not None or family.kv_heads:
        kv_heads = _int(config, "num_key_value_heads", where)
    width = _int(config, "hidden_size", where)
    longest = _int(config, "max_position_embeddings", where, family.context)
    head_dim = _int(config, "head_dim", where, family.head_dim or width // max(heads, 1))
    window = _window(config, family)
    limit = min(longest, window or longest)
    if context > limit:
        what = (
            f"attention slides over a window of {window} tokens"
            if limit == window
            else f"{limit} tokens is longest"
        )
        raise CheckpointError(f"{where}: a context of {context} is too long: {what}.")
    bias = bool(config.get("attention_bias", False)) if family.qkv_bias is None else family.qkv_bias
    model = ModelConfig(
        layers=_int(config, "num_hidden_layers", where),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        # as a configuration written by hand has it
        head_dim=0 if head_dim * heads == width else head_dim,
        mlp_width=_int(config, "intermediate_size", where),
        vocab_size=_int(config, "vocab_size", where),
        context=context or limit,
        norm_eps=_float(config, "rms_norm_eps", where, 1e-6),
        qkv_bias=bias,
        qk_norm=family.qk_norm,
        tied=bool(config.get("tie_word_embeddings", False)),
        **_rope(config, where, longest),
    )
    try:
        check_model(model)
    except ConfigError as e:
        raise CheckpointError(f"{where}: {e}") from e
    return model


def config_of(m: ModelConfig, layers: int) -> dict[str, object]:
    """The `config.json` of a plain model of this shape with so many layers; `model_of` is its
    inverse.

    Raises CheckpointError: no published architecture computes this."""
    if m.qkv_bias and m.qk_norm:
        raise CheckpointError(
            "no published architecture has both q/k/v biases and QK-norm without other biases."
        )
    if m.logit_cap:
        raise CheckpointError(
            f"logit_cap = {m.logit_cap} is not part of Llama or Qwen, so it cannot be written."
        )
    if m.smear:
        raise CheckpointError(
            f"smear = {m.smear} is not part of Llama or Qwen, so it cannot be written."
        )
    name = (
        "Qwen2ForCausalLM"
        if m.qkv_bias
        else "Qwen3ForCausalLM"
        if m.qk_norm
        else "LlamaForCausalLM"
    )
    config: dict[str, object] = {
        "architectures": [name],
        "model_type": FAMILIES[name].kind,
        "num_hidden_layers": layers,
        "hidden_size": m.width,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.dims[2],
        "intermediate_size": m.mlp_width,
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.context,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "tie_word_embeddings": m.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
    }
    if name == "Qwen2ForCausalLM":
        del config["attention_bias"]
        config["use_sliding_window"] = False
    if m.rope_scaling != "none":
        values = {key: getattr(m, field) for key, field in ROPE[m.rope_scaling].items()}
        if values.get("attention_factor") == 0.0:
            del values["attention_factor"]
        config["rope_scaling"] = {"rope_type": m.rope_scaling, **values}
    return config


class Place(NamedTuple):
    """A tensor of a published model, and the part of a leaf that it is:
    `leaf[index].reshape(shape)`."""

    shape: tuple[int, ...]
    leaf: tuple[str, ...]
    index: Index  # type: ignore[assignment]  # not tuple.index


def places(m: ModelConfig, blocks: Sequence[tuple[str, str]]) -> dict[str, Place]:
    """Every tensor of a model, by name. `blocks`: of each layer its part and number, ("core",
    "0")."""
    found = table_places(m)
    for layer, block in enumerate(blocks):
        for name, place in block_places(m, block).items():
            found[f"model.layers.{layer}.{name}"] = place
    return found


def plain_places(m: ModelConfig) -> dict[str, Place]:
    """`places` of a plain model as it is imported."""
    return places(m, [("core", str(i)) for i in range(m.layers)])


def table_places(m: ModelConfig) -> dict[str, Place]:
    """The tensors that are not of a block."""
    table = (m.vocab_size, m.width)
    found = {
        "model.embed_tokens.weight": Place(table, ("embed", "table"), ...),
        "model.norm.weight": Place((m.width,), ("norm", "scale"), ...),
    }
    return found if m.tied else found | {"lm_head.weight": Place(table, ("head", "table"), ...)}


def block_places(m: ModelConfig, block: tuple[str, str]) -> dict[str, Place]:
    """The tensors of one block, named within it; `block`: its part and number."""
    heads, kv, hd = m.dims
    groups, d, f = heads // kv, m.width, m.mlp_width
    query: Index = (slice(None), slice(0, groups))
    key: Index = (slice(None), groups)
    value: Index = (slice(None), groups + 1)
    rows = {
        "input_layernorm.weight": Place((d,), ("norm_1", "scale"), ...),
        "post_attention_layernorm.weight": Place((d,), ("norm_2", "scale"), ...),
        "self_attn.q_proj.weight": Place((heads * hd, d), ("attention", "qkv"), query),
        "self_attn.k_proj.weight": Place((kv * hd, d), ("attention", "qkv"), key),
        "self_attn.v_proj.weight": Place((kv * hd, d), ("attention", "qkv"), value),
        "self_attn.o_proj.weight": Place((d, heads * hd), ("attention", "out"), ...),
        "mlp.gate_proj.weight": Place((f, d), ("mlp", "gate_up"), (0,)),
        "mlp.up_proj.weight": Place((f, d), ("mlp", "gate_up"), (1,)),
        "mlp.down_proj.weight": Place((d, f), ("mlp", "down"), ...),
    }
    if m.qkv_bias:
        rows["self_attn.q_proj.bias"] = Place((heads * hd,), ("attention", "bias"), query)
        rows["self_attn.k_proj.bias"] = Place((kv * hd,), ("attention", "bias"), key)
        rows["self_attn.v_proj.bias"] = Place((kv * hd,), ("attention", "bias"), value)
    if m.qk_norm:
        rows["self_attn.q_norm.weight"] = Place((hd,), ("attention", "q_norm", "scale"), ...)
        rows["self_attn.k_norm.weight"] = Place((hd,), ("attention", "k_norm", "scale"), ...)
    return {name: place._replace(leaf=(*block, *place.leaf)) for name, place in rows.items()}


def _rope(config: Json, where: str, longest: int) -> dict[str, Any]:
    """The fields of the rotary embedding."""
    new = config.get("rope_parameters")
    given = new if isinstance(new, Mapping) else config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: rope_scaling must be an object, got {given!r}.")
    given = dict(given)
    theta = given.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given.pop("type", None)
    if given.pop("partial_rotary_factor", 1) != 1:
        raise CheckpointError(f"{where}: a rotary embedding of part of each head is not supported.")
    fields: dict[str, Any] = {"rope_theta": _number(theta, "rope_theta", where)}
    if kind == "default":
        return fields
    if kind not in ROPE:
        raise CheckpointError(
            f"{where}: rope scaling {kind!r} is not supported; those that are: {', '.join(ROPE)}."
        )
    if kind != "linear":
        given.setdefault(
            "original_max_position_embeddings",
            config.get("original_max_position_embeddings", longest),
        )
    else:
        given.pop("original_max_position_embeddings", None)
    fields["rope_scaling"] = kind
    for key, value in given.items():
        if value is None:
            continue
        if key not in ROPE[kind]:
            raise CheckpointError(
                f"{where}: rope scaling {kind} with {key} = {value!r} is not supported."
            )
        field = ROPE[kind][key]
        number = _number(value, key, where)
        fields[field] = int(number) if field == "rope_original_context" else number
    return fields


def _window(config: Json, family: Family) -> int | None:
    """Tokens that attention slides over; None: all."""
    if family.kind.startswith("qwen") and not config.get("use_sliding_window", False):
        return None
    window = config.get("sliding_window", family.window)
    return window if isinstance(window, int) and window > 0 else None


def _int(config: Json, key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{where}: {key} must be a whole number, got {value!r}.")
    return value


def _float(config: Json, key: str, where: str, default: float) -> float:
    value = config.get(key)
    return default if value is None else _number(value, key, where)


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{where}: {key} must be a number, got {value!r}.")
    return float(value)
