"""Sampling one token per sequence, on device. Greedy at temperature 0."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mor_jax.errors import UserError

# top-p looks among this many most likely tokens; sorting a 49k vocabulary costs more than a layer
TOP_P_CAP = 1024


@dataclass(frozen=True)
class Sampling:
    """temperature 0: greedy. top_k 0: off. top_p 1: off. min_p 0: off, else a share of the
    likeliest token's probability below which none is drawn. Static under jit."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 (greedy) or more, got {self.temperature}.")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], got {self.min_p}.")


def sample(logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Token ids [B] from float32 logits.

    Args:
      keys_B: one PRNG key a sequence, so that a draw depends on its own sequence alone.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    vocab = logits_BxV.shape[-1]
    scaled = logits_BxV / sampling.temperature
    if sampling.min_p:
        likely = scaled >= jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        scaled = jnp.where(likely, scaled, -jnp.inf)
    if not sampling.top_k and sampling.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys_B, scaled).astype(jnp.int32)
    candidates = min(sampling.top_k or TOP_P_CAP, vocab)
    top_BxC, index_BxC = jax.lax.top_k(scaled, candidates)
    if sampling.top_p < 1:
        share = jnp.exp(
            top_BxC
            - jax.nn.logsumexp(scaled if not sampling.top_k else top_BxC, axis=-1, keepdims=True)
        )
        before = jnp.cumsum(share, axis=-1) - share
        # the most likely token always stays
        top_BxC = jnp.where(before < sampling.top_p, top_BxC, -jnp.inf)
    choice = jax.vmap(jax.random.categorical)(keys_B, top_BxC)
    return jnp.take_along_axis(index_BxC, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
