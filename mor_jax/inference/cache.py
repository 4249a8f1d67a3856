"""The key-value cache: append-only streams, packed to the front, each entry with the position it
had.

Prelude and coda keep every token. What the core keeps is the KV strategy's (`model/kv.py`):

    full            R streams; every token is in each
    recursion_wise R streams; stream r holds only the tokens that ran r. One that stopped earlier
                    takes no room there and is invisible, exactly as in the full causal forward pass
    shared one stream, the keys of r = 1 of every token; steps r > 1 read it and write nothing
    hybrid R streams; every token is in each. Where it did not run r its entry is a copy of its
                    entry at r - 1, so that a step reads one stream and not the newest of several

    hybrid_first as hybrid, but where a token did not run r its entry is a copy of its entry at step
    1

Under shared and the hybrids a token of depth 0 (stopped before step 1 by the causal rule of
expert-choice) is in the stream of r = 1 like any other: step 1 always runs, for everyone, and only
the state of the token is left as it was.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.model.block import Attend
from mor_jax.model.kv import KeyValue


class Stream(NamedTuple):
    """Keys and values of the blocks of one part at one depth. S slots, of which `length` are in
    use."""

    k: tuple[jax.Array, ...]  # one a block, [B, K, S, H], rotary embedding applied
    v: tuple[jax.Array, ...]
    pos_BxS: jax.Array  # position of each entry in its sequence
    length_B: jax.Array


class Cache(NamedTuple):
    """All streams of a batch of sequences."""

    prelude: Stream
    core: tuple[Stream, ...]  # one a recursion step, or one alone when keys are shared
    coda: Stream
    length_B: jax.Array  # tokens seen
    recent_BxS: jax.Array | None = None  # the last tokens, with `model.smear`
    hash_B: jax.Array | None = None  # of all tokens, if the exit rule draws (`LM.seen`)

    def entries_RxB(self) -> jax.Array:
        """Entries in use in each stream of the core."""
        return jnp.stack([s.length_B for s in self.core])


def compact(stream_kv: list[KeyValue], active_BxT: jax.Array, slots: int) -> Stream:
    """The stream of a prompt: entries of active tokens moved to the front, in order.

    Args:
      stream_kv: (k, v) of each block over the whole prompt, [B, K, T, H], T <= slots.
    """
    order = jnp.argsort(~active_BxT, axis=-1, stable=True)
    room = slots - active_BxT.shape[1]

    def pack(x: jax.Array) -> jax.Array:  # [B, K, T, H]
        packed = jax.vmap(lambda a, i: a[:, i])(x, order)
        return jnp.pad(packed, ((0, 0), (0, 0), (0, room), (0, 0)))

    return Stream(
        tuple(pack(k) for k, _ in stream_kv),
        tuple(pack(v) for _, v in stream_kv),
        jnp.pad(order.astype(jnp.int32), ((0, 0), (0, room))),
        jnp.sum(active_BxT, axis=-1, dtype=jnp.int32),
    )


def last_entries(stream: Stream) -> list[KeyValue]:
    """The newest entry of every sequence: (k, v) of each block, [B, K, 1, H]."""
    row, slot_B = jnp.arange(stream.length_B.shape[0]), stream.length_B - 1

    def newest(x: jax.Array) -> jax.Array:
        return x[row, :, slot_B][:, :, None]

    return [(newest(k), newest(v)) for k, v in zip(stream.k, stream.v, strict=True)]


def _attention(
    q_BxKxGx1xH: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pos_B: jax.Array,
    pos_BxS: jax.Array,
    used_BxS: jax.Array,
) -> jax.Array:
    """Of one token a sequence, to the entries in use."""
    ones = jnp.ones_like(pos_B[:, None])
    return nn.attention(
        q_BxKxGx1xH, k, v, pos_B[:, None], pos_BxS, ones, used_BxS.astype(jnp.int32), "xla"
    )


def _used(stream: Stream) -> jax.Array:
    return jnp.arange(stream.pos_BxS.shape[1])[None] < stream.length_B[:, None]


def readers(stream: Stream, pos_B: jax.Array) -> list[Attend]:
    """Attention of each block for one token per sequence that looks at the stream and adds nothing
    to it."""
    used_BxS = _used(stream)

    def reader(k: jax.Array, v: jax.Array) -> Attend:
        return lambda q, _k, _v: (_attention(q, k, v, pos_B, stream.pos_BxS, used_BxS), None)

    return [reader(k, v) for k, v in zip(stream.k, stream.v, strict=True)]


class New(NamedTuple):
    """Which sequences get a new entry, and where it comes from: made by the blocks, or, for those
    not in `fresh_B`, the `kept` (k, v) of each block."""

    writes_B: jax.Array
    fresh_B: jax.Array | None = None
    kept: list[KeyValue] | None = None


class Appender:
    """One more token per sequence: attention of each block that appends to the stream, then looks
    at it; and the grown stream."""

    def __init__(self, stream: Stream, pos_B: jax.Array, new: New):
        slots = stream.pos_BxS.shape[1]
        self._before, self._new, self._pos_B = stream, new, pos_B
        self._row = jnp.arange(pos_B.shape[0])
        # Sequences without a new entry write out of bounds, which `mode="drop"` makes nothing at
        # all.
        self._slot_B = jnp.where(new.writes_B, stream.length_B, slots)
        self._after = stream._replace(
            pos_BxS=stream.pos_BxS.at[self._row, self._slot_B].set(pos_B, mode="drop"),
            length_B=stream.length_B + new.writes_B,
        )
        self._used_BxS = _used(self._after)

    def _write(self, block: int, k_BxKx1xH: jax.Array, v_BxKx1xH: jax.Array) -> KeyValue:
        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return x.at[self._row, :, self._slot_B].set(new[:, :, 0], mode="drop")

        return put(self._before.k[block], k_BxKx1xH), put(self._before.v[block], v_BxKx1xH)

    def _attend(
        self, block: int, q: jax.Array, k: jax.Array | None, v: jax.Array | None
    ) -> tuple[jax.Array, KeyValue]:
        assert k is not None and v is not None, "written"
        if self._new.kept is not None and self._new.fresh_B is not None:
            fresh = self._new.fresh_B[:, None, None, None]
            k, v = (
                jnp.where(fresh, made, kept)
                for made, kept in zip((k, v), self._new.kept[block], strict=True)
            )
        grown = self._write(block, k, v)
        return _attention(q, *grown, self._pos_B, self._after.pos_BxS, self._used_BxS), grown

    def attends(self) -> list[Attend]:
        """One a block; beside its output, each returns the block's grown keys and values."""
        return [functools.partial(self._attend, i) for i in range(len(self._before.k))]

    def grown(self, key_values: list[KeyValue]) -> Stream:
        """The stream afterwards, of what the blocks returned."""
        return self._after._replace(
            k=tuple(k for k, _ in key_values), v=tuple(v for _, v in key_values)
        )

    def copied(self) -> Stream:
        """The stream afterwards when no block runs and everyone writes what was kept."""
        return self.grown([self._write(i, *kv) for i, kv in enumerate(self._new.kept or ())])
