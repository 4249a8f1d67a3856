"""Greedy decoding of a random Llama with llama.cpp (bindings of llama-cpp-python; writing the model
needs `gguf`).

    python llama_decode.py '{"vocab_size": 49152, ..., "folder": "/somewhere"}'

All sequences are decoded in one batch of llama.cpp, each with its own part of the cache.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from pathlib import Path
from typing import Any

from lines import converse

KEPT: list[Any] = []  # llama.cpp calls it for as long as it runs


def write_model(path: Path, c: dict[str, Any]) -> None:
    """A Llama of random weights without a tokenizer: matrices in the wanted type, norms in
    float32."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    kind = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[
        c["dtype"]
    ]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(c["context"])
    writer.add_embedding_length(c["width"])
    writer.add_block_count(c["layers"])
    writer.add_feed_forward_length(c["mlp_width"])
    writer.add_head_count(c["heads"])
    writer.add_head_count_kv(c["kv_heads"])
    writer.add_rope_dimension_count(c["width"] // c["heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, *shape: int) -> None:
        w = rng.standard_normal(shape, dtype=np.float32) * np.float32(c["init_std"])
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, w)
        else:
            writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)

    ones = np.ones(c["width"], np.float32)
    width, mlp, kv = c["width"], c["mlp_width"], c["width"] // c["heads"] * c["kv_heads"]
    matrix("token_embd.weight", c["vocab_size"], width)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(c["layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name, rows in (
            ("attn_q", width),
            ("attn_k", kv),
            ("attn_v", kv),
            ("attn_output", width),
            ("ffn_gate", mlp),
            ("ffn_up", mlp),
        ):
            matrix(f"blk.{i}.{name}.weight", rows, width)
        matrix(f"blk.{i}.ffn_down.weight", width, mlp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def start(c: dict[str, Any]):
    import llama_cpp as lib
    import numpy as np

    folder = Path(c["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"random-{c['dtype']}.gguf"
    write_model(path, c)
    KEPT.append(lib.llama_log_callback(lambda level, text, data: None))
    lib.llama_log_set(KEPT[0], ctypes.c_void_p(0))
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise SystemExit(f"llama.cpp could not load {path}.")

    def measure(q: dict[str, Any]) -> dict[str, Any]:
        prompts = q["tokens"]
        rows, length = len(prompts), len(prompts[0])
        want = lib.llama_context_default_params()
        new = q["warm"] + q["blocks"] * q["block"] + 2
        want.n_ctx = rows * -(-(length + new) // 256) * 256
        want.n_seq_max, want.n_batch, want.n_ubatch = rows, max(rows * length, 64), 512
        want.n_threads = want.n_threads_batch = c["threads"]
        context = lib.llama_init_from_model(model, want)
        if not context:
            raise SystemExit("llama.cpp made no context.")
        batch = lib.llama_batch_init(rows * length, 0, 1)

        def decode(entries: list[tuple[int, int, int, bool]]) -> None:
            batch.n_tokens = len(entries)
            for i, (token, position, row, logits) in enumerate(entries):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, logits
            if lib.llama_decode(context, batch):
                raise SystemExit("llama_decode failed.")

        def drawn(places: Any) -> list[int]:
            def at(i):
                return np.ctypeslib.as_array(
                    lib.llama_get_logits_ith(context, i), (c["vocab_size"],)
                )

            return [int(at(i).argmax()) for i in places]

        begin = time.perf_counter()
        decode(
            [
                (t, p, r, p == length - 1)
                for r, prompt in enumerate(prompts)
                for p, t in enumerate(prompt)
            ]
        )
        tokens, position = drawn([(r + 1) * length - 1 for r in range(rows)]), length
        prefill = time.perf_counter() - begin

        def steps(n: int) -> float:
            nonlocal tokens, position
            begin = time.perf_counter()
            for _ in range(n):
                decode([(t, position, r, True) for r, t in enumerate(tokens)])
                tokens, position = drawn(range(rows)), position + 1
            return time.perf_counter() - begin

        steps(q["warm"])
        blocks = [steps(q["block"]) for _ in range(q["blocks"])]
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return {"prefill": prefill, "blocks": blocks}

    version = f"llama.cpp by llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    return {"version": version, "threads": c["threads"]}, measure


if __name__ == "__main__":
    converse(start)
