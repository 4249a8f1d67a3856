"""Causal inference with a cache: `prefill` a prompt, then `decode_step` token by token.

Both compute what the full causal forward pass (`LM.forward(mode="causal")`) computes; tests hold them equal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.inference.cache import Appender, Cache, compact
from mor_jax.model.depth import DepthControl
from mor_jax.model.lm import LM
from mor_jax.model.recurse import run_masked


def prefill(
    lm: LM, params: dict, tokens_BxT: jax.Array, lengths_B: jax.Array, slots: int,
    control: DepthControl | None = None,
) -> tuple[jax.Array, Cache, jax.Array]:  # fmt: skip
    """Run prompts through the model and fill a cache.

    Args:
      tokens_BxT: right-padded prompts, T <= slots.
      lengths_B: real tokens of each, at least 1.
      slots: longest sequence (prompt and generated tokens) the cache has room for; static.
      control: dial, floor and cap of each prompt's depth.
    Returns:
      (logits_BxV after each prompt's last token, the cache, depth_BxT of the prompt's tokens).
    """
    length = tokens_BxT.shape[1]
    pos = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens_BxT.shape)
    seg = (pos < lengths_B[:, None]).astype(jnp.int32)
    rope = lm.rope(pos)
    impl = lm.model.attention

    def attend_and_keep(kv_seg):
        return lambda q, k, v: (nn.attention(q, k, v, pos, pos, seg, kv_seg, impl), (k, v))

    x, prelude = lm.blocks(params["prelude"], lm.embed(params, tokens_BxT), rope, attend_and_keep(seg))
    core_params = lm.gathered_core(params)
    core = lambda h, _pos, _seg, kv_seg: lm.blocks(core_params, h, rope, attend_and_keep(kv_seg), lm.program.repeat)
    result = run_masked(lm.steered(control), params["router"], core, x, pos, seg, causal=True, keep_extra=True)
    x, coda = lm.blocks(params["coda"], result.h_BxTxD, rope, attend_and_keep(seg))

    last = jnp.take_along_axis(x, (lengths_B - 1)[:, None, None], axis=1)
    logits = lm.logits(params, lm.final_norm(params, last))[:, 0]
    real = seg > 0
    core_streams = tuple(
        compact([(k[r], v[r]) for k, v in result.extra], result.active_RxBxT[r], slots)
        for r in range(lm.program.recursions)
    )
    cache = Cache(compact(prelude, real, slots), core_streams, compact(coda, real, slots), lengths_B)
    return logits, cache, result.depth_BxT


def decode_step(
    lm: LM, params: dict, cache: Cache, token_B: jax.Array, control: DepthControl | None = None
) -> tuple[jax.Array, Cache, jax.Array]:
    """One token for every sequence.

    Args:
      cache: donate it; room for one more entry per sequence is the caller's to ensure.
      token_B: the tokens to append.
      control: as in `prefill`; another one may be given at every step.
    Returns:
      (logits_BxV for the next token, the grown cache, depth_B of these tokens).
    """
    pos_B = cache.length_B
    everyone = jnp.ones(pos_B.shape, bool)
    rope = lm.rope(pos_B[:, None])

    prelude = Appender(cache.prelude, pos_B, everyone)
    h, _ = lm.blocks(params["prelude"], lm.embed(params, token_B[:, None]), rope, prelude)

    core_params = lm.gathered_core(params)
    active, depth, streams = everyone, jnp.zeros(pos_B.shape, jnp.int32), []
    policy = lm.steered(control)
    route = policy.begin(params["router"], h, everyone[:, None])
    for r, stream in enumerate(cache.core):
        step = jax.tree.map(lambda leaf, r=r: leaf[r], route.steps)
        z = policy.score(step, h)
        active = policy.select(step, z, active[:, None], route.tokens, None)[:, 0]

        def run(args, step=step, z=z, active=active):
            h, stream = args
            append = Appender(stream, pos_B, active)
            y, _ = lm.blocks(core_params, h, rope, append, lm.program.repeat)
            return jnp.where(active[:, None, None], policy.combine(step, h, y, z, route.tokens), h), append.stream

        # A step nobody runs is skipped, not computed and thrown away.
        h, stream = jax.lax.cond(jnp.any(active), run, lambda args: args, (h, stream))
        streams.append(stream)
        depth += active

    coda = Appender(cache.coda, pos_B, everyone)
    x, _ = lm.blocks(params["coda"], h, rope, coda)
    logits = lm.logits(params, lm.final_norm(params, x))[:, 0]
    return logits, Cache(prelude.stream, tuple(streams), coda.stream, pos_B + 1), depth
