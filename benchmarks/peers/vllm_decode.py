"""Greedy decoding of a random Llama with vLLM on a CPU, in its own engine.

    python vllm_decode.py '{"vocab_size": 49152, ..., "folder": "/somewhere"}'

The engine hands out whole generations, so the time of a block is the difference between a long and
a short one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lines import converse


def start(c: dict[str, Any]):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ["OMP_NUM_THREADS"] = str(c["threads"])
    import vllm

    folder = Path(c["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": c["vocab_size"],
                "hidden_size": c["width"],
                "intermediate_size": c["mlp_width"],
                "num_hidden_layers": c["layers"],
                "num_attention_heads": c["heads"],
                "num_key_value_heads": c["kv_heads"],
                "hidden_act": "silu",
                "max_position_embeddings": c["context"],
                "initializer_range": c["init_std"],
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "tie_word_embeddings": True,
                "torch_dtype": c["dtype"],
                "bos_token_id": 0,
                "eos_token_id": 0,
            }
        )
    )
    engine = vllm.LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=c["dtype"],
        max_num_seqs=64,
        max_model_len=c["context"],
        enable_prefix_caching=False,
    )

    def run(tokens: list[list[int]], new: int) -> float:
        wish = vllm.SamplingParams(
            temperature=0.0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        engine.generate([{"prompt_token_ids": t} for t in tokens], wish, use_tqdm=False)
        return time.perf_counter() - begin

    def measure(q: dict[str, Any]) -> dict[str, Any]:
        first = 1 + q["warm"]
        prefill, short = run(q["tokens"], 1), run(q["tokens"], first)
        whole = run(q["tokens"], first + q["blocks"] * q["block"]) - short
        return {"prefill": prefill, "blocks": [whole / q["blocks"]]}

    return {"version": f"vllm {vllm.__version__}", "threads": c["threads"]}, measure


if __name__ == "__main__":
    converse(start)
