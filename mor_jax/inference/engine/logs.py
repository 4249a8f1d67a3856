"""Where keys and values of the lanes live, and how attention reads them: the one place that knows
the layout.

A lane owns append-only *logs*, one for each part (prelude, core, coda). An entry of the core's log
is one token at one recursion step, in the order in which they ran; its *tag* is a bit mask of the
steps whose queries see it. A stream, that is what one step attends to, is the entries with its bit:
all depths share one log, so its room follows the sum of the depths and no depth can run out of room
while another has some.

    full, recursion_wise   an entry a step that a token ran, seen by that step
    shared                 an entry a token, made at step 1, seen by all steps
    hybrid an entry a step that a token ran, seen by that step and, the newest, by all later ones
    hybrid_first an entry a step that a token ran, seen by that step; that of step 1 by all steps it
    did not run

Keys are stored after rotary embedding and a token is decoded after all tokens before it, so neither
positions nor a causal mask are needed: what is in the log, below its length, with the right bit, is
seen.

Keys lie with their entries side by side, [K, H, size], values with them one below the other, [K,
size, H]: both products of attention then run along rows of what is kept. XLA on CPUs reads keys
kept like values at half that rate or less.

Logs are read in place. XLA copies what a gather or a dynamic slice takes out of a cache, which
costs more than the attention itself, while a masked product over the entries of other steps costs
what reading them costs. So a log is cut into *segments*, arrays of their own; a segment no lane has
reached is skipped. The softmax is built up segment by segment, and one that holds nothing for a
lane changes nothing in its result, to the last bit, so that a long sequence in another lane is not
noticed. Later segments may exist for the first lanes only: those are the lanes with more room.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

FIRST = 256  # entries of the first segment; each later one is as long as all before it
MASKED = -1e30
LN2 = math.log(2)
_KEYS, _VALUES, _TAGS = 3, 2, 1  # the axis of entries in what is kept


class Segment(NamedTuple):
    """Entries start .. start + size of the first `lanes` lanes. Static."""

    start: int
    size: int
    lanes: int


Layout = tuple[Segment, ...]


class Log(NamedTuple):
    """Keys and values of one block application, an array a segment, as `stored`."""

    k: tuple[jax.Array, ...]  # [lanes, K, H, size]
    v: tuple[jax.Array, ...]  # [lanes, K, size, H]


def layout(rooms: Sequence[int]) -> Layout:
    """Segments of logs in which lane i has room for rooms[i] entries; rooms must not rise."""
    if list(rooms) != sorted(rooms, reverse=True) or rooms[-1] < 1:
        raise ValueError(f"rooms of lanes must be positive and must not rise, got {list(rooms)}")
    ends = set(rooms)
    edge = FIRST
    while edge < rooms[0]:
        # A sliver next to the end of a class of lanes would be one more product for nothing.
        if all(not edge < room < edge * 1.25 for room in ends):
            ends.add(edge)
        edge *= 2
    starts = [0, *sorted(ends)]
    return tuple(
        Segment(a, b - a, sum(room >= b for room in rooms)) for a, b in itertools.pairwise(starts)
    )


def stored(x: jax.Array) -> jax.Array:
    """As it is kept in a log: the bits of bfloat16 as integers. XLA on CPUs converts all of a
    bfloat16 array to float32 and back to write one row of it; integers it writes in place."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def loaded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Inverse of `stored`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def empty_log(shape: Layout, kv_heads: int, head_dim: int, dtype: str) -> Log:
    """A log with nothing in it."""

    def zeros(*of: int) -> jax.Array:
        return stored(jnp.zeros(of, dtype))

    return Log(
        tuple(zeros(s.lanes, kv_heads, head_dim, s.size) for s in shape),
        tuple(zeros(s.lanes, kv_heads, s.size, head_dim) for s in shape),
    )


def empty_tags(shape: Layout) -> tuple[jax.Array, ...]:
    """Tags of the entries, int32 [lanes, size] a segment."""
    return tuple(jnp.zeros((s.lanes, s.size), jnp.int32) for s in shape)


class View(NamedTuple):
    """What a query may see of a log, the same for all blocks of a part."""

    seen: tuple[jax.Array, ...]  # bool [lanes, size] a segment
    reached: tuple[jax.Array, ...]  # bool: whether any lane has entries in the segment


def view(
    shape: Layout,
    length_N: jax.Array,
    tags: Sequence[jax.Array] | None = None,
    step_N: jax.Array | None = None,
) -> View:
    """The entries of each lane below its length, and, given tags, with the bit of its step. N
    lanes, or one alone."""
    seen = []
    for i, s in enumerate(shape):
        here = jnp.arange(s.start, s.start + s.size) < length_N[: s.lanes, None]
        if tags is not None and step_N is not None:
            here &= (tags[i] >> step_N[: s.lanes, None]) & 1 == 1
        seen.append(here)
    return View(tuple(seen), tuple(jnp.max(length_N[: s.lanes]) > s.start for s in shape))


# ------------------------------------------------------------------------------------- attention


class Softmax(NamedTuple):
    """A softmax under way: what its exponents are taken off, sum of exponentials, weighted sum of
    values. All float32.

    `top` is the largest score rounded up to a multiple of ln 2. Which keys came in which part, and
    what was largest among them, then changes weights by powers of two, and a weight that is rounded
    to bfloat16 before it meets its value is rounded the same way everywhere. Off the largest score
    itself it would be rounded anew in every partition of the keys: verification of drafts, prefill
    and decoding would be so far apart that greedy tokens differ.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Softmax:
        """Before any key, for queries of this shape."""
        zeros = jnp.zeros(shape[:-1], jnp.float32)
        return cls(zeros + MASKED, zeros, jnp.zeros(shape, jnp.float32))

    def add(
        self, score: jax.Array, mask: jax.Array, weigh: Callable[[jax.Array], jax.Array]
    ) -> Softmax:
        """With more keys; `weigh` maps their weights to the sum of their values. What is masked in
        all of them changes nothing, to the last bit."""
        score = jnp.where(mask, score, MASKED)
        top = jnp.maximum(self.top, jnp.ceil(jnp.max(score, axis=-1) / LN2) * LN2)
        weight = jnp.where(mask, jnp.exp(score - top[..., None]), 0.0)
        shrink = jnp.exp(self.top - top)
        total = self.total * shrink + jnp.sum(weight, axis=-1)
        return Softmax(top, total, self.out * shrink[..., None] + weigh(weight))

    def result(self, dtype: str | jnp.dtype) -> jax.Array:
        """Weighted means of the values; zeros for a query that saw none."""
        return (self.out / jnp.maximum(self.total, 1e-30)[..., None]).astype(dtype)


def attend_lanes(q_NxKxGxH: jax.Array, log: Log, seen: View) -> jax.Array:
    """Of one token a lane to its log, which holds its own key already. [N, K, G, H]; zeros where
    nothing is seen."""
    q, dtype, scale = q_NxKxGxH, q_NxKxGxH.dtype, q_NxKxGxH.shape[-1] ** -0.5

    def add(part: Softmax, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> Softmax:
        k, v = loaded(k, dtype), loaded(v, dtype)
        score = jnp.einsum("NKGH,NKHS->NKGS", q, k, preferred_element_type=jnp.float32) * scale

        def weigh(w: jax.Array) -> jax.Array:
            return jnp.einsum(
                "NKGS,NKSH->NKGH", w.astype(dtype), v, preferred_element_type=jnp.float32
            )

        return part.add(score, seen[:, None, None], weigh)

    so_far = Softmax.empty(q.shape)
    for i, (k, v) in enumerate(zip(log.k, log.v, strict=True)):
        lanes = k.shape[0]
        part = jax.tree.map(lambda x, n=lanes: x[:n], so_far)
        args = (part, q[:lanes], k, v, seen.seen[i])
        part = (
            add(*args)
            if i == 0
            else jax.lax.cond(seen.reached[i], add, lambda part, *_: part, *args)
        )

        def join(new: jax.Array, old: jax.Array) -> jax.Array:
            return (
                jnp.concatenate([new, old[new.shape[0] :]]) if new.shape[0] < old.shape[0] else new
            )

        so_far = jax.tree.map(join, part, so_far)
    return so_far.result(dtype)


def of_lane(log: Log, lane: jax.Array) -> Log:
    """Copy of one lane's log, segments [K, H, size] and [K, size, H]. A lane beyond a segment has
    no entries in it, so that it does not matter whose are taken there."""

    def take(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, lane, keepdims=False)

    return jax.tree.map(take, log)


def attend_chunk(
    q_TxKxGxH: jax.Array,
    log: Log,
    seen: View,
    own_k_UxKxH: jax.Array,
    own_v_UxKxH: jax.Array,
    own_TxU: jax.Array,
) -> jax.Array:
    """Of T tokens of one lane to its log (of `of_lane`; `seen` is a view of this lane alone) and,
    by a mask, to U keys that are not in the log yet. [T, K, G, H]."""
    q, dtype, scale = q_TxKxGxH, q_TxKxGxH.dtype, q_TxKxGxH.shape[-1] ** -0.5
    q_KxGxTxH = jnp.moveaxis(q, 0, 2)

    def add(
        part: Softmax, q: jax.Array, k_KxHxS: jax.Array, v_KxSxH: jax.Array, mask: jax.Array
    ) -> Softmax:
        score = jnp.einsum("KGTH,KHS->KGTS", q, k_KxHxS, preferred_element_type=jnp.float32) * scale

        def weigh(w: jax.Array) -> jax.Array:
            return jnp.einsum(
                "KGTS,KSH->KGTH", w.astype(dtype), v_KxSxH, preferred_element_type=jnp.float32
            )

        return part.add(score, mask, weigh)

    so_far = Softmax.empty(q_KxGxTxH.shape)
    so_far = add(
        so_far,
        q_KxGxTxH,
        jnp.moveaxis(own_k_UxKxH, 0, 2),
        own_v_UxKxH.swapaxes(0, 1),
        own_TxU[None, None],
    )

    def from_log(
        part: Softmax, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
    ) -> Softmax:
        return add(part, q, loaded(k, dtype), loaded(v, dtype), seen)

    for i, (k, v) in enumerate(zip(log.k, log.v, strict=True)):
        args = (so_far, q_KxGxTxH, k, v, seen.seen[i])
        so_far = jax.lax.cond(seen.reached[i], from_log, lambda part, *_: part, *args)
    return jnp.moveaxis(so_far.result(dtype), 2, 0)


# ------------------------------------------------------------------------------------- writing


def places(shape: Layout, slot: jax.Array, writes: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Of each segment: the lanes' numbers and where their entries go, [lanes, ...] like slots and
    flags; out of bounds, and so nowhere, where nothing is written."""
    out = []
    for s in shape:
        inside = writes & (slot >= s.start) & (slot < s.start + s.size)
        lane = jnp.arange(s.lanes).reshape(-1, *(1,) * (slot.ndim - 1))
        out.append((lane, jnp.where(inside, slot - s.start, s.size)[: s.lanes]))
    return out


def put(log: Log, where: Sequence[tuple[jax.Array, jax.Array]], k: jax.Array, v: jax.Array) -> Log:
    """Entries [lanes, ..., K, H] at these places."""
    k, v = stored(k), stored(v)
    keys = [
        x.at[lane, :, :, at].set(k[: len(x)], mode="drop")
        for x, (lane, at) in zip(log.k, where, strict=True)
    ]
    values = [
        x.at[lane, :, at].set(v[: len(x)], mode="drop")
        for x, (lane, at) in zip(log.v, where, strict=True)
    ]
    return Log(tuple(keys), tuple(values))


def put_tags(
    tags: Sequence[jax.Array], where: Sequence[tuple[jax.Array, jax.Array]], tag: jax.Array
) -> tuple[jax.Array, ...]:
    """Their tags."""
    return tuple(
        x.at[at].set(tag[: len(x)], mode="drop") for x, at in zip(tags, where, strict=True)
    )


def append_lanes(
    shape: Layout,
    log: Log,
    slot_N: jax.Array,
    writes_N: jax.Array,
    k_NxKxH: jax.Array,
    v_NxKxH: jax.Array,
) -> Log:
    """One entry at `slot_N` for every lane that writes."""
    return put(log, places(shape, slot_N, writes_N), k_NxKxH, v_NxKxH)


def tag_lanes(
    shape: Layout,
    tags: Sequence[jax.Array],
    slot_N: jax.Array,
    writes_N: jax.Array,
    tag_N: jax.Array,
) -> tuple[jax.Array, ...]:
    """Tags with that of the entry at `slot_N` replaced in every lane that writes."""
    return put_tags(tags, places(shape, slot_N, writes_N), tag_N)


def _window(s: Segment, slot: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, int]:
    """Where in a segment `rows` entries from `slot` on may land: (start of a window of static size,
    which of the rows each place of it takes (may be out of range), the size)."""
    size = min(s.size, rows)
    start = jnp.clip(slot - s.start, 0, s.size - size)
    return start, start + jnp.arange(size) + s.start - slot, size


def append_chunk(
    shape: Layout,
    log: Log,
    lane: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    k_WxKxH: jax.Array,
    v_WxKxH: jax.Array,
) -> Log:
    """The first `count` of these entries of one lane, appended from `slot` on."""

    def put(arrays: Sequence[jax.Array], axis: int, rows: jax.Array) -> tuple[jax.Array, ...]:
        return _append(shape, arrays, axis, lane, slot, count, stored(rows))

    return Log(put(log.k, _KEYS, k_WxKxH), put(log.v, _VALUES, v_WxKxH))


def tag_chunk(
    shape: Layout,
    tags: Sequence[jax.Array],
    lane: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    tag_W: jax.Array,
) -> tuple[jax.Array, ...]:
    """Their tags."""
    return _append(shape, tags, _TAGS, lane, slot, count, tag_W)


def _append(
    shape: Layout,
    arrays: Sequence[jax.Array],
    axis: int,
    lane: jax.Array,
    slot: jax.Array,
    count: jax.Array,
    rows: jax.Array,
) -> tuple[jax.Array, ...]:
    """By windows and not by scatter, which XLA on CPUs does a row at a time."""
    out = []
    for s, array in zip(shape, arrays, strict=True):
        start, row, size = _window(s, slot, rows.shape[0])
        fits = _along(axis, array.ndim, (row >= 0) & (row < count) & (lane < s.lanes))
        new = jnp.take(rows, jnp.clip(row, 0, rows.shape[0] - 1), axis=0)
        at, sizes = _lane_window(array, axis, lane, start, size)
        old = jax.lax.dynamic_slice(array, at, sizes)
        out.append(
            jax.lax.dynamic_update_slice(
                array, jnp.where(fits, jnp.moveaxis(new, 0, axis - 1)[None], old), at
            )
        )
    return tuple(out)


def read_chunk(
    shape: Layout, log: Log, lane: jax.Array, slot: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the entries slot .. slot + rows of one lane, [rows, K, H] as `stored`;
    zeros where the log ends. Inverse of `append_chunk`, which takes them as they are."""
    return _read(shape, log.k, _KEYS, lane, slot, rows), _read(
        shape, log.v, _VALUES, lane, slot, rows
    )


def read_tags(
    shape: Layout, tags: Sequence[jax.Array], lane: jax.Array, slot: jax.Array, rows: int
) -> jax.Array:
    """Their tags, [rows]."""
    return _read(shape, tags, _TAGS, lane, slot, rows)


def _read(
    shape: Layout,
    arrays: Sequence[jax.Array],
    axis: int,
    lane: jax.Array,
    slot: jax.Array,
    rows: int,
) -> jax.Array:
    out: jax.Array | int = 0
    for s, array in zip(shape, arrays, strict=True):
        start, _, size = _window(s, slot, rows)
        found = jnp.moveaxis(
            jax.lax.dynamic_slice(array, *_lane_window(array, axis, lane, start, size))[0],
            axis - 1,
            0,
        )
        place = slot + jnp.arange(rows) - s.start - start
        inside = _along(0, found.ndim, (place >= 0) & (place < size) & (lane < s.lanes))
        out = jnp.where(inside, jnp.take(found, jnp.clip(place, 0, size - 1), axis=0), out)
    assert not isinstance(out, int), "a log has a segment"
    return out


def _along(axis: int, ndim: int, x: jax.Array) -> jax.Array:
    """A vector as an array of so many dimensions, all 1 but this."""
    return x.reshape(*(1,) * axis, -1, *(1,) * (ndim - 1 - axis))


def _lane_window(
    array: jax.Array, axis: int, lane: jax.Array, start: jax.Array, size: int
) -> tuple[list[jax.Array | int], list[int]]:
    """Where a window of one lane's entries lies, as `dynamic_slice` takes it."""
    at: list[jax.Array | int] = [0] * array.ndim
    sizes = list(array.shape)
    at[0], sizes[0], at[axis], sizes[axis] = lane, 1, start, size
    return at, sizes


# ---------------------------------------------------- a few tokens in a row of every lane at once


def attend_spans(
    q_NxTxKxGxH: jax.Array,
    log: Log,
    seen: View,
    own_k_NxTxKxH: jax.Array,
    own_v_NxTxKxH: jax.Array,
    own_NxTxT: jax.Array,
) -> jax.Array:
    """Of T tokens a lane to its log and, by a mask, to keys of theirs that are not in the log yet.
    [N, T, K, G, H]."""
    q_NxKxGxTxH, dtype = jnp.moveaxis(q_NxTxKxGxH, 1, 3), q_NxTxKxGxH.dtype
    scale = q_NxTxKxGxH.shape[-1] ** -0.5

    def add(
        part: Softmax,
        q: jax.Array,
        k_NxKxHxS: jax.Array,
        v_NxKxSxH: jax.Array,
        mask_NxTxS: jax.Array,
    ) -> Softmax:
        score = (
            jnp.einsum("NKGTH,NKHS->NKGTS", q, k_NxKxHxS, preferred_element_type=jnp.float32)
            * scale
        )

        def weigh(w: jax.Array) -> jax.Array:
            return jnp.einsum(
                "NKGTS,NKSH->NKGTH", w.astype(dtype), v_NxKxSxH, preferred_element_type=jnp.float32
            )

        return part.add(score, mask_NxTxS[:, None, None], weigh)

    so_far = Softmax.empty(q_NxKxGxTxH.shape)
    own_k, own_v = jnp.moveaxis(own_k_NxTxKxH, 1, 3), own_v_NxTxKxH.swapaxes(1, 2)
    so_far = add(so_far, q_NxKxGxTxH, own_k, own_v, own_NxTxT)

    def from_log(
        part: Softmax, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
    ) -> Softmax:
        return add(part, q, loaded(k, dtype), loaded(v, dtype), mask)

    for i, (k, v) in enumerate(zip(log.k, log.v, strict=True)):
        lanes = k.shape[0]
        part = jax.tree.map(lambda x, n=lanes: x[:n], so_far)
        args = (part, q_NxKxGxTxH[:lanes], k, v, seen.seen[i][:, None])
        part = jax.lax.cond(seen.reached[i], from_log, lambda part, *_: part, *args)

        def join(new: jax.Array, old: jax.Array) -> jax.Array:
            return (
                jnp.concatenate([new, old[new.shape[0] :]]) if new.shape[0] < old.shape[0] else new
            )

        so_far = jax.tree.map(join, part, so_far)
    return jnp.moveaxis(so_far.result(dtype), 3, 1)


def _slots(slot_N: jax.Array, writes_NxU: jax.Array) -> jax.Array:
    """[N, U]: where entries go, the written ones packed from `slot_N` on."""
    return slot_N[:, None] + jnp.cumsum(writes_NxU, axis=1) - 1


def append_spans(
    shape: Layout,
    log: Log,
    slot_N: jax.Array,
    writes_NxU: jax.Array,
    k_NxUxKxH: jax.Array,
    v_NxUxKxH: jax.Array,
) -> Log:
    """Those of the U entries of each lane that are written, from `slot_N` on."""
    return put(log, places(shape, _slots(slot_N, writes_NxU), writes_NxU), k_NxUxKxH, v_NxUxKxH)


def tag_spans(
    shape: Layout,
    tags: Sequence[jax.Array],
    slot_N: jax.Array,
    writes_NxU: jax.Array,
    tag_NxU: jax.Array,
) -> tuple[jax.Array, ...]:
    """Their tags."""
    return put_tags(tags, places(shape, _slots(slot_N, writes_NxU), writes_NxU), tag_NxU)
