"""Greedy decoding of a random Llama with PyTorch's transformers: the plain loop over `model(...,
past_key_values)`.

    python torch_decode.py '{"vocab_size": 49152, "width": 576, ..., "dtype": "bfloat16", \\
        "threads": 2}'

then a line {"tokens": [[...], ...], "warm": 13, "blocks": 5, "block": 10} a measurement; it answers
in seconds.
"""

from __future__ import annotations

import time
from typing import Any

from lines import converse


def start(c: dict[str, Any]):
    import torch
    import transformers

    torch.set_num_threads(c["threads"])
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c["vocab_size"],
            hidden_size=c["width"],
            intermediate_size=c["mlp_width"],
            num_hidden_layers=c["layers"],
            num_attention_heads=c["heads"],
            num_key_value_heads=c["kv_heads"],
            max_position_embeddings=c["context"],
            initializer_range=c["init_std"],
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
    )
    model = model.to(getattr(torch, c["dtype"])).eval()

    @torch.inference_mode()
    def measure(q: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        out = model(input_ids=torch.tensor(q["tokens"]), use_cache=True, logits_to_keep=1)
        cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        prefill = time.perf_counter() - begin

        def steps(n: int) -> float:
            nonlocal cache, token
            begin = time.perf_counter()
            for _ in range(n):
                out = model(input_ids=token, past_key_values=cache, use_cache=True)
                cache, token = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            return time.perf_counter() - begin

        steps(q["warm"])
        return {"prefill": prefill, "blocks": [steps(q["block"]) for _ in range(q["blocks"])]}

    facts = {
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return facts, measure


if __name__ == "__main__":
    converse(start)
