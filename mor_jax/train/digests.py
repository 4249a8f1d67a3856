"""Digests of arrays, which do not depend on how they are sharded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def digest(x: jax.Array) -> jax.Array:
    """uint32[2] that depends on every bit of `x` and its place, but not on sharding, order or host
    count.

    Each element's bits are mixed with its flat index by the murmur3 finalizer (a bijection: damage
    to a single element is always seen) and summed modulo 2^32; the second sum is of the first one's
    terms, mixed again. One variadic reduction, because XLA on CPU would otherwise keep a temporary
    as large as `x`.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # 8 bytes: a last axis of 2
    bits = jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    first = _mix(bits ^ _mix(index + jnp.uint32(0x9E3779B9)))
    second = _mix(first ^ jnp.uint32(0x5BD1E995))
    zero = jnp.zeros((), jnp.uint32)
    sums = jax.lax.reduce(
        (first, second),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(bits.ndim)),
    )
    return jnp.stack(sums)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


@functools.cache
def _digest_on(sharding: NamedSharding | None) -> Any:
    return jax.jit(digest, out_shardings=sharding)


def table(tree: Any) -> dict[str, list[Any]]:
    """{leaf name: [shape, dtype, digest]} of a pytree of arrays. One small compilation a distinct
    leaf shape."""
    names, leaves = named(tree)
    # Replicated over the leaf's own mesh, so that every process can read it.
    mesh = [getattr(getattr(x, "sharding", None), "mesh", None) for x in leaves]
    sums = [
        _digest_on(m and NamedSharding(m, PartitionSpec()))(x)
        for m, x in zip(mesh, leaves, strict=True)
    ]
    rows = zip(names, leaves, jax.device_get(sums), strict=True)
    return {name: [list(np.shape(x)), dtype(x), f"{s[0]:08x}{s[1]:08x}"] for name, x, s in rows}


def named(tree: Any) -> tuple[list[str], list[Any]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    if len(set(names)) != len(names):
        raise ValueError("two leaves of the state have the same path; do not use '/' in keys.")
    return names, [leaf for _, leaf in flat]


def dtype(x: Any) -> str:
    return str(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype)
