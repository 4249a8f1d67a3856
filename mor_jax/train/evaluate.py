"""Held-out evaluation, always in both modes.

Top-k selection over a row looks at future tokens, so its loss is not what the model can generate
with; the causal (threshold) loss is. Both are reported, with the numbers that tell whether they
belong together: sampling accuracy (does the threshold agree with top-k?), dead tokens (positions no
row ever takes to the last recursion: high accuracy can hide that routing has degenerated to "always
the same positions"), and mean depth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.data.loader import Batch
from mor_jax.inference.dial import depth_control
from mor_jax.model.depth import DepthControl
from mor_jax.model.lm import CAUSAL, LM, ROW, STATES, TOPK
from mor_jax.model.loss import next_token_targets
from mor_jax.nn.parameters import Tree
from mor_jax.parallel.rows import over_rows


@functools.partial(jax.jit, static_argnums=(0, 4))
def eval_step(
    lm: LM,
    params: Any,
    batch: Batch,
    token_bytes_V: jax.Array,
    mode: str,
    control: DepthControl | None = None,
) -> dict[str, jax.Array]:
    """Sums over one batch; nothing that cannot be added up over batches. `control`: of each row, in
    causal mode."""
    tokens, seg = batch["tokens"], batch["segment_ids"]
    out = lm.forward(params, tokens, seg, mode=mode, control=control)
    targets, weights = next_token_targets(tokens, seg, batch.get("weights"))
    weights = (weights > 0).astype(jnp.float32)  # a token counts whole or not at all

    def losses(params: Tree, h: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return (lm.token_nll(params, h, targets), ())

    nll, _ = over_rows(lm.rules, losses, (lm.logical_axes(), STATES, ROW), ROW)(
        params, out.h_BxTxD, targets
    )
    real = seg > 0
    depths = jnp.arange(lm.program.recursions + 1)
    at_depth = (out.depth_BxT[..., None] == depths) & real[..., None]
    return {
        "nll": jnp.sum(nll * weights),
        "targets": jnp.sum(weights),
        "bytes": jnp.sum(token_bytes_V[targets] * weights),
        "depth": jnp.sum(at_depth, axis=(0, 1)).astype(jnp.float32),
        "nll_by_depth": jnp.sum(at_depth * (nll * weights)[..., None], axis=(0, 1)),
        "targets_by_depth": jnp.sum(at_depth * weights[..., None], axis=(0, 1)),
        "deepest_by_position": jnp.sum(out.active_RxBxT[-1], axis=0).astype(jnp.float32),
        "real_by_position": jnp.sum(real, axis=0).astype(jnp.float32),
        "candidates": out.stats.candidates,
        "agree": out.stats.agree,
    }


def padded_token_bytes(token_bytes: np.ndarray, vocab_size: int) -> jax.Array:
    """float32 [V]: UTF-8 bytes of each token; ids beyond the tokenizer's stand for nothing."""
    return jnp.asarray(np.pad(token_bytes, (0, vocab_size - len(token_bytes))), jnp.float32)


def _total(
    lm: LM,
    params: Any,
    batches: Iterable[Batch],
    token_bytes_V: jax.Array,
    mode: str,
    **limits: Any,
) -> dict[str, np.ndarray]:
    total: dict[str, Any] = {}
    for batch in batches:
        control = depth_control(lm, params, len(batch["tokens"]), **limits) if limits else None
        sums = jax.device_get(eval_step(lm, params, batch, token_bytes_V, mode, control))
        # float64 on the host: thousands of float32 batch sums would lose digits.
        total = {k: np.asarray(v, np.float64) + total.get(k, 0.0) for k, v in sums.items()}
    return total


def _bits_per_byte(nll: float, n_bytes: float) -> float:
    return nll / math.log(2) / n_bytes if n_bytes else float("nan")


def evaluate(lm: LM, params: Any, batches: list[Batch], token_bytes_V: jax.Array) -> dict[str, Any]:
    """The record of one evaluation.

    Args:
      batches: tokens and segment_ids [B, T] each; walked over once per mode.
      token_bytes_V: see `padded_token_bytes`.
    Returns:
      `topk/` and `causal/` nll (nats a token), bits_per_byte, mean_depth, depth_share (share of
      tokens with depth 0..R), active_share (share that ran step 1..R), depth_nll (nll of the
      predictions made at tokens of depth 0..R; 0 where there are none); sampling_accuracy (mean
      over routers) and per router;
      dead_token_ratio. Bits per byte divide the loss of all predicted tokens, document ends
      included, by the bytes of the predicted text. Under the fixed policy both modes are the same
      computation, run once.
    """
    routed = lm.depth.routed
    record: dict[str, Any] = {}
    topk = causal = _total(lm, params, batches, token_bytes_V, TOPK)
    if routed:
        causal = _total(lm, params, batches, token_bytes_V, CAUSAL)
    for mode, t in ((TOPK, topk), (CAUSAL, causal)):
        share = t["depth"] / t["depth"].sum()
        record |= {
            f"{mode}/nll": float(t["nll"] / t["targets"]),
            f"{mode}/bits_per_byte": _bits_per_byte(float(t["nll"]), float(t["bytes"])),
            f"{mode}/mean_depth": float(share @ np.arange(len(share))),
            f"{mode}/depth_share": [float(s) for s in share],
            f"{mode}/active_share": [float(s) for s in np.cumsum(share[::-1])[::-1][1:]],
            f"{mode}/depth_nll": [
                float(v) for v in t["nll_by_depth"] / np.maximum(t["targets_by_depth"], 1.0)
            ],
        }
    if routed:
        accuracy = topk["agree"] / topk["candidates"]
        seen = topk["real_by_position"] > 0
        record |= {
            "sampling_accuracy": float(accuracy.mean()),
            **{f"router/{r + 1}/sampling_accuracy": float(a) for r, a in enumerate(accuracy)},
            "dead_token_ratio": float((topk["deepest_by_position"][seen] == 0).mean()),
        }
    return record | {"tokens": float(topk["targets"]), "bytes": float(topk["bytes"])}


def evaluate_at(
    lm: LM, params: Any, batches: list[Batch], token_bytes_V: jax.Array, **limits: Any
) -> dict[str, Any]:
    """Causal evaluation at one setting of the depth: nll, bits_per_byte, mean_depth, depth_share,
    as in `evaluate`.

    Args:
      limits: mean_depth, min_depth, max_depth of `inference.dial.depth_control`.
    Raises:
      UserError: a depth the model cannot have.
    """
    t = _total(lm, params, batches, token_bytes_V, CAUSAL, **limits)
    share = t["depth"] / t["depth"].sum()
    return {
        "nll": float(t["nll"] / t["targets"]),
        "bits_per_byte": _bits_per_byte(float(t["nll"]), float(t["bytes"])),
        "mean_depth": float(share @ np.arange(len(share))),
        "depth_share": [float(s) for s in share],
    }
