"""The training step of a plain Llama in PyTorch, as most people run it: the dense twin's peer.

Needs torch and transformers and nothing of this project, so any Python that has them can run it:

    python torch_train_step.py '{"vocab_size": 2048, "width": 512, ...}'

It speaks lines of JSON. On stdin: first the batch (a list of rows of token ids), then "step" for
each step wanted; the end of the input ends it. On stdout: one object when ready, one a step.
Between lines it is blocked on stdin and uses no core. The step is `LlamaForCausalLM` with fused
attention ("sdpa") and tied embeddings, forward and loss, backward, clipping, fused AdamW with decay
on matrices only; float32, or bfloat16 under autocast with float32 parameters.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time


def main() -> None:
    config = json.loads(sys.argv[1])
    # a library that prints must not break the conversation
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(record: dict) -> None:
        print(json.dumps(record), file=answers, flush=True)

    import torch
    import transformers

    torch.set_num_threads(config["threads"])
    torch.manual_seed(config["seed"])
    device = torch.device(config["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "torch of this Python sees no GPU; give --peer another Python, or --peer off."
        )
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["width"],
            intermediate_size=config["mlp_width"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            num_key_value_heads=config["kv_heads"],
            head_dim=config["head_dim"],
            max_position_embeddings=config["context"],
            rms_norm_eps=config["norm_eps"],
            initializer_range=config["init_std"],
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(device)
    model.train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config["weight_decay"]},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config["peak_lr"],
        betas=(config["b1"], config["b2"]),
        eps=config["eps"],
        fused=True,
    )
    half = config["dtype"] == "bfloat16"
    tokens = torch.tensor(json.loads(sys.stdin.readline()), dtype=torch.long, device=device)

    def step() -> dict:
        cpu, start = time.process_time(), time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
        wait()
        ahead = time.perf_counter()
        loss.backward()
        wait()
        back = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(parameters, config["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        end = time.perf_counter()
        return {
            "wall": end - start,
            "cpu": time.process_time() - cpu,
            "forward": ahead - start,
            "backward": back - ahead,
            "optimizer": end - back,
            "loss": loss.item(),
        }

    answer(
        {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "parameters": sum(p.numel() for p in parameters),
        }
    )
    for line in sys.stdin:
        if line.strip() == "step":
            answer(step())


if __name__ == "__main__":
    main()
