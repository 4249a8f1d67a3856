"""Configuration of a recursive-depth language model, as mor_jax writes it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MorConfig(PretrainedConfig):
    """`model` is the shape of the network, `depth` says who recurses how often; both with the names
    of mor_jax's own configuration. The names that libraries ask for follow from `model`."""

    model_type = "mor"
    keys_to_ignore_at_inference = ("past_key_values", "depth")

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        depth: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        m = dict(model or {})
        self.model, self.depth = m, dict(depth or {})
        shape = {
            "hidden_size": m.get("width", 0),
            "num_hidden_layers": m.get("layers", 0),
            "num_attention_heads": m.get("heads", 0),
            "num_key_value_heads": m.get("kv_heads", 0),
            "head_dim": m.get("head_dim", 0),
            "intermediate_size": m.get("mlp_width", 0),
            "vocab_size": m.get("vocab_size", 0),
            "max_position_embeddings": m.get("context", 0),
            "tie_word_embeddings": m.get("tied", True),
        }
        super().__init__(**{**kwargs, **shape})
