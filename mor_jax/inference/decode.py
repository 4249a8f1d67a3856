"""Causal inference with a cache: `prefill` a prompt, then `decode_step` token by token.

Both compute what the full causal forward pass (`LM.forward(mode="causal")`) computes; tests hold
them equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.inference.cache import Appender, Cache, New, Stream, compact, last_entries, readers
from mor_jax.model.block import Attend
from mor_jax.model.depth import DepthControl, TokenInfo
from mor_jax.model.kv import HYBRID_FIRST, SHARED, looks_back
from mor_jax.model.lm import LM
from mor_jax.model.recurse import Core, run_masked
from mor_jax.nn.parameters import Tree

Update = Callable[[jax.Array, jax.Array], jax.Array]  # state before a step, the core's output


def prefill(
    lm: LM,
    params: Tree,
    tokens_BxT: jax.Array,
    lengths_B: jax.Array,
    slots: int,
    control: DepthControl | None = None,
) -> tuple[jax.Array, Cache, jax.Array]:
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
    rope, kv = lm.rope(pos), lm.kv()
    keep = lm.attend_row(pos, seg, seg, keep=True)

    x, prelude = lm.blocks(params["prelude"], lm.embed(params, tokens_BxT, pos), rope, keep)
    core, x = lm.looped(lm.core(params, pos, keep=True), params, x, pos)
    seen = lm.seen(tokens_BxT, pos)
    result = run_masked(
        lm.steered(control, params, seen),
        params["router"],
        core,
        x,
        pos,
        seg,
        causal=True,
        kv=kv,
        keep_extra=True,
        numbered=lm.numbered,
        ids_BxT=tokens_BxT,
    )
    x, coda = lm.blocks(params["coda"], lm.loop.read(result.h_BxTxD), rope, keep)

    last = jnp.take_along_axis(x, (lengths_B - 1)[:, None, None], axis=1)
    logits = lm.logits(params, lm.final_norm(params, last))[:, 0]
    real = seg > 0
    streams = [[(k[i], v[i]) for k, v in result.extra] for i in range(result.extra[0][0].shape[0])]
    kept = [real] * len(streams) if looks_back(kv) else result.active_RxBxT
    core_streams = tuple(
        compact(of_blocks, who, slots) for of_blocks, who in zip(streams, kept, strict=True)
    )
    cache = Cache(
        compact(prelude, real, slots), core_streams, compact(coda, real, slots), lengths_B
    )
    if lm.model.smear:
        at_BxS = lengths_B[:, None] - jnp.arange(lm.model.smear, 0, -1)
        cache = cache._replace(
            recent_BxS=jnp.take_along_axis(tokens_BxT, jnp.maximum(at_BxS, 0), axis=1)
        )
    if seen is not None:
        last = jnp.take_along_axis(seen, (lengths_B - 1)[:, None], axis=1)
        cache = cache._replace(hash_B=last[:, 0])
    return logits, cache, result.depth_BxT


def decode_step(
    lm: LM, params: Tree, cache: Cache, token_B: jax.Array, control: DepthControl | None = None
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

    x, recent = (
        lm.embed(params, token_B[:, None], pos_B[:, None], cache.recent_BxS),
        cache.recent_BxS,
    )
    h, prelude = _append(lm, params["prelude"], x, rope, cache.prelude, pos_B)
    if recent is not None:
        recent = jnp.concatenate([recent[:, 1:], token_B[:, None]], axis=1)

    core_params, kv = lm.gathered_core(params), lm.kv()

    def blocks(h: jax.Array, attends: list[Attend], **how: Any) -> tuple[jax.Array, list[Any]]:
        return lm.blocks(core_params, h, rope, attends, lm.program.repeat, **how)

    looped, h = lm.looped(blocks, params, h, pos_B[:, None])
    active, depth = everyone, jnp.zeros(pos_B.shape, jnp.int32)
    streams: list[Stream] = []
    seen = lm.seen(token_B[:, None], pos_B[:, None], cache.hash_B)
    policy = lm.steered(control, params, seen)
    memory = policy.remember(h)
    route = policy.begin(
        params["router"], h, TokenInfo(everyone[:, None], pos_B[:, None], token_B[:, None])
    )
    for r in range(lm.program.recursions):
        step, core = (
            jax.tree.map(lambda leaf, r=r: leaf[r], route.steps),
            functools.partial(looped, recursion=r),
        )
        z = policy.score(step, h)
        candidates = everyone if policy.reenters else active
        active = policy.select(step, z, candidates[:, None], route.tokens, None)[:, 0]
        depth += active
        before = h

        def update(
            h: jax.Array,
            y: jax.Array,
            step: Any = step,
            z: jax.Array = z,
            active: jax.Array = active,
        ) -> jax.Array:
            return jnp.where(active[:, None, None], policy.combine(step, h, y, z, route.tokens), h)

        if r and kv == SHARED:

            def read(h: jax.Array, update: Update = update, core: Core = core) -> jax.Array:
                return update(h, core(h, readers(streams[0], pos_B), queries_only=True)[0])

            h = jax.lax.cond(jnp.any(active), read, lambda h: h, h)
        else:
            if not looks_back(kv):
                new, needed = New(active), jnp.any(active)
            elif r == 0:
                new, needed = New(everyone), jnp.any(everyone)
            # who does not run the step takes its entry of the step before along, or that of step 1
            else:
                source = streams[0] if kv == HYBRID_FIRST else streams[-1]
                new, needed = New(everyone, active, last_entries(source)), jnp.any(active)
            h, stream = _grow(core, h, cache.core[r], pos_B, new, needed, update)
            streams.append(stream)
        goes_on, memory = policy.judge(step, memory, before, h)
        active = active if goes_on is None else active & goes_on[:, 0]

    h = lm.loop.read(policy.finish(memory, h))
    x, coda = _append(lm, params["coda"], h, rope, cache.coda, pos_B)
    logits = lm.logits(params, lm.final_norm(params, x))[:, 0]
    hash_B = None if seen is None else seen[:, 0]
    return logits, Cache(prelude, tuple(streams), coda, pos_B + 1, recent, hash_B), depth


def _append(
    lm: LM, params: Tree, x: jax.Array, rope: Any, stream: Stream, pos_B: jax.Array
) -> tuple[jax.Array, Stream]:
    """One token of every sequence through a part that keeps all tokens."""
    append = Appender(stream, pos_B, New(jnp.ones(pos_B.shape, bool)))
    y, grown = lm.blocks(params, x, rope, append.attends())
    return y, append.grown(grown)


def _grow(
    core: Core,
    h: jax.Array,
    stream: Stream,
    pos_B: jax.Array,
    new: New,
    needed: jax.Array,
    update: Update,
) -> tuple[jax.Array, Stream]:
    """A recursion step that writes keys. One that is not `needed` is skipped, not computed and
    thrown away."""

    def run(h: jax.Array, stream: Stream) -> tuple[jax.Array, Stream]:
        append = Appender(stream, pos_B, new)
        y, grown = core(h, append.attends())
        return update(h, y), append.grown(grown)

    def skip(h: jax.Array, stream: Stream) -> tuple[jax.Array, Stream]:
        return h, stream if new.kept is None else Appender(stream, pos_B, new).copied()

    return jax.lax.cond(needed, run, skip, h, stream)
