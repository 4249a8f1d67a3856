"""What a finished run leaves: its summary, and held-out passages for reports."""

from __future__ import annotations

from typing import Any

from mor_jax.analysis import accounting
from mor_jax.analysis.ngram import TrigramByteModel, rows_to_bytes
from mor_jax.config import Config
from mor_jax.data.prepare import PreparedData

SAMPLE_ROWS, SAMPLE_TEXT = 16, 40_000  # held-out rows, and characters of them
TRIGRAM_BYTES = 32 << 20  # training text the reference trigram model reads at most


def counted(cfg: Config, steps: int, record: dict[str, Any]) -> dict[str, Any]:
    """Tokens, parameters, FLOPs and cache bytes of a run of `steps` steps. `record`: of its last
    evaluation."""
    return {
        "tokens": steps * accounting.tokens_per_step(cfg),
        "parameters": accounting.parameters(cfg.model, cfg.depth, cfg.recursion).to_dict(),
        "paper_flops_per_token": accounting.paper_flops_per_token(cfg.model, cfg.depth),
        "true_flops_per_token": accounting.true_flops_per_token(
            cfg.model, cfg.depth, recursion=cfg.recursion
        ).total,
        "paper_training_flops": accounting.paper_training_flops(cfg, steps),
        "true_training_flops": accounting.true_training_flops(cfg, steps),
        "kv_bytes_per_token": accounting.kv_bytes_per_token(
            # With a fixed depth there is nothing to measure, and a block repeated in place has
            # no steps to share.
            cfg.model,
            cfg.depth,
            mean_active=record["causal/active_share"] if cfg.depth.routed else None,
        ),
    }


def sample_text(data: PreparedData) -> str:
    """Held-out passages, for reports, which then need no corpus."""
    rows = range(min(SAMPLE_ROWS, len(data.validation)))
    text = "".join(data.tokenizer.decode(data.validation[i]["tokens"]) for i in rows)
    return text[:SAMPLE_TEXT]


def trigram_bits_per_byte(cfg: Config, data: PreparedData) -> float | None:
    """Of a trigram model on the rows the evaluation read: the floor a trained model must beat.
    None: the tokenizer's tokens stand for no bytes."""
    if not data.tokenizer.token_bytes.any():
        return None
    bytes_per_row = data.stats["train"]["bytes"] / max(len(data.train), 1)
    rows = min(len(data.train), int(TRIGRAM_BYTES / max(bytes_per_row, 1.0)) + 1)
    held_out = min(cfg.train.eval_rows or len(data.validation), len(data.validation))
    model = TrigramByteModel.fit(
        rows_to_bytes((data.train[i] for i in range(rows)), data.tokenizer)
    )
    return model.bits_per_byte(
        rows_to_bytes((data.validation[i] for i in range(held_out)), data.tokenizer)
    )
