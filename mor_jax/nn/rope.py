"""Rotary position embedding (arXiv 2104.09864), half-split layout as in Llama, and its scaling to
longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig


def rope_table(m: ModelConfig, pos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin of shape [..., head_dim / 2] in float32 for integer positions, [B, T] or [M]
    (original ones: a gathered token keeps the position it had in its document)."""
    frequency = m.rope_theta ** (-jnp.arange(0, m.dims[2], 2, dtype=jnp.float32) / m.dims[2])
    angle = pos[..., None].astype(jnp.float32) * scaled(m, frequency)
    if m.rope_scaling != "yarn":
        return jnp.cos(angle), jnp.sin(angle)
    # Queries and keys both carry the factor, so scores are multiplied by its square (YaRN, section
    # 3.4).
    return jnp.cos(angle) * yarn_attention(m), jnp.sin(angle) * yarn_attention(m)


def scaled(m: ModelConfig, frequency_h: jax.Array) -> jax.Array:
    """Angular frequencies [H / 2], radians a position, as `rope_scaling` changes them.

    * linear: all divided by the factor, so positions are interpolated (arXiv 2306.15595).
    * llama3: those whose wavelength is long beside the original context divided, short ones kept,
      between the two a straight line in the number of wavelengths that the original context holds
      (Llama 3.1, arXiv 2407.21783; the rule is that of the released code).
    * yarn: likewise, with the line in the number of the dimension (arXiv 2309.00071, section 3.2;
      its ends are rounded outwards to whole dimensions, as in the released code).
    """
    if m.rope_scaling == "none":
        return frequency_h
    long = frequency_h / m.rope_factor
    if m.rope_scaling == "linear":
        return long
    if m.rope_scaling == "llama3":
        turns_h = m.rope_original_context * frequency_h / (2 * math.pi)
        kept_h = (turns_h - m.rope_low_freq_factor) / (
            m.rope_high_freq_factor - m.rope_low_freq_factor
        )
    else:
        # The dimension that makes so many turns over the original context; fewer turns in later
        # ones.
        def turning(turns: float) -> float:
            return (
                m.dims[2]
                * math.log(m.rope_original_context / (turns * 2 * math.pi))
                / (2 * math.log(m.rope_theta))
            )

        first = max(math.floor(turning(m.rope_beta_fast)), 0)
        last = min(math.ceil(turning(m.rope_beta_slow)), m.dims[2] - 1)
        kept_h = 1 - (jnp.arange(m.dims[2] // 2, dtype=jnp.float32) - first) / (
            (last - first) or 1e-3
        )
    kept_h = jnp.clip(kept_h, 0.0, 1.0)
    return long * (1 - kept_h) + frequency_h * kept_h


def yarn_attention(m: ModelConfig) -> float:
    """Factor on cos and sin under YaRN; by default the paper's, 0.1 ln(factor) + 1."""
    return m.rope_attention_factor or 0.1 * math.log(m.rope_factor) + 1.0


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [B, heads..., T, H] by tables [B, T, H / 2], or x [M, heads..., H] by tables [M, H /
    2]. The tables are broadcast over the head axes. Computed in float32, in the dtype of x."""
    heads = x.ndim - cos.ndim

    def expand(t: jax.Array) -> jax.Array:
        return t.reshape(t.shape[0], *(1,) * heads, *t.shape[1:])

    cos, sin = expand(cos), expand(sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
