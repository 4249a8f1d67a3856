"""The key-value cache: one append-only stream per (sequence, depth).

Prelude and coda keep every token. At recursion step r a stream holds only the tokens that ran r (recursion-wise
caching, paper 2.2.2), packed to the front, each with the position it had: a token that stopped earlier takes no
room there and is invisible, exactly as in the full causal forward pass. Under the fixed policy every token is in
every stream ("full").
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.model.lm import LM


class Stream(NamedTuple):
    """Keys and values of the blocks of one part at one depth. S slots, of which `length` are in use."""

    k: tuple[jax.Array, ...]  # one a block, [B, K, S, H], rotary embedding applied
    v: tuple[jax.Array, ...]
    pos_BxS: jax.Array  # position of each entry in its sequence
    length_B: jax.Array


class Cache(NamedTuple):
    """All streams of a batch of sequences."""

    prelude: Stream
    core: tuple[Stream, ...]  # one a recursion step
    coda: Stream
    length_B: jax.Array  # tokens seen

    def entries_RxB(self) -> jax.Array:
        """Entries in use at each recursion depth."""
        return jnp.stack([s.length_B for s in self.core])


def empty_stream(lm: LM, blocks: int, batch: int, slots: int) -> Stream:
    """A stream with room for `slots` entries and none in use."""
    _, kv_heads, head_dim = lm.model.dims
    zeros = lambda: tuple(jnp.zeros((batch, kv_heads, slots, head_dim), lm.model.dtype) for _ in range(blocks))
    return Stream(zeros(), zeros(), jnp.zeros((batch, slots), jnp.int32), jnp.zeros((batch,), jnp.int32))


def compact(stream_kv: list[tuple[jax.Array, jax.Array]], active_BxT: jax.Array, slots: int) -> Stream:
    """The stream of a prompt: entries of active tokens moved to the front, in order.

    Args:
      stream_kv: (k, v) of each block over the whole prompt, [B, K, T, H], T <= slots.
    """
    order = jnp.argsort(~active_BxT, axis=-1, stable=True)
    room = slots - active_BxT.shape[1]

    def pack(x):  # [B, K, T, H]
        packed = jax.vmap(lambda a, i: a[:, i])(x, order)
        return jnp.pad(packed, ((0, 0), (0, 0), (0, room), (0, 0)))

    return Stream(
        tuple(pack(k) for k, _ in stream_kv),
        tuple(pack(v) for _, v in stream_kv),
        jnp.pad(order.astype(jnp.int32), ((0, 0), (0, room))),
        jnp.sum(active_BxT, axis=-1, dtype=jnp.int32),
    )


class Appender:
    """`attend` functions for one token per sequence that append to the stream's blocks in turn, then look at it.

    Used for the blocks of one part in order; `stream` afterwards is the grown stream.
    """

    def __init__(self, stream: Stream, pos_B: jax.Array, active_B: jax.Array):
        slots = stream.pos_BxS.shape[1]
        self._row = jnp.arange(pos_B.shape[0])
        # Sequences that do not run this step write out of bounds, which `mode="drop"` makes nothing at all.
        self._slot_B = jnp.where(active_B, stream.length_B, slots)
        self._pos_B = pos_B
        self._k, self._v = list(stream.k), list(stream.v)
        self._pos_BxS = stream.pos_BxS.at[self._row, self._slot_B].set(pos_B, mode="drop")
        self._length_B = stream.length_B + active_B
        self._used_BxS = (jnp.arange(slots)[None] < self._length_B[:, None]).astype(jnp.int32)
        self._block = 0

    def __call__(self, q_BxKxGx1xH: jax.Array, k_BxKx1xH: jax.Array, v_BxKx1xH: jax.Array) -> tuple[jax.Array, None]:
        i = self._block
        self._block += 1
        self._k[i] = self._k[i].at[self._row, :, self._slot_B].set(k_BxKx1xH[:, :, 0], mode="drop")
        self._v[i] = self._v[i].at[self._row, :, self._slot_B].set(v_BxKx1xH[:, :, 0], mode="drop")
        ones = jnp.ones_like(self._pos_B[:, None])
        return nn.attention(
            q_BxKxGx1xH, self._k[i], self._v[i], self._pos_B[:, None], self._pos_BxS, ones, self._used_BxS, "xla"
        ), None

    @property
    def stream(self) -> Stream:
        return Stream(tuple(self._k), tuple(self._v), self._pos_BxS, self._length_B)
