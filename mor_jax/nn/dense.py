"""The matrix product of the network."""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax


class Product(Protocol):
    """x [..., in...] times w [out..., in...] -> [..., out...], over the last `contract` axes of x.

    The result has the dtype of x, or `dtype`, in which it is then accumulated, too. How the product
    is computed, and how the weight lies, is the implementation's: `dense` reads parameters as they
    are, `inference/engine/layers.py` reads [out, in] matrices that were prepared once and returns
    their outputs flat, [..., O].
    """

    def __call__(self, x: jax.Array, w: Any, contract: int = 1, dtype: Any = None) -> jax.Array: ...


def dense(x: jax.Array, w: jax.Array, contract: int = 1, dtype: Any = None) -> jax.Array:
    """The product of training and of the plain decode; see `Product`.

    Written as a product of two plain matrices, tokens by features: with the axes left apart, XLA on
    CPUs runs the weight gradient at two thirds of the speed. When the weight is split over devices
    its axes stay apart, since flattening across a sharded axis would gather it; so do those of the
    head (the product with a `dtype`), whose gradient is written by hand.
    """
    w = w.astype(x.dtype)
    rows, first = x.shape[: x.ndim - contract], w.ndim - contract
    mesh = jax.sharding.get_abstract_mesh()
    if dtype is not None or (not mesh.empty and mesh.shape.get("tensor", 1) > 1):
        axes = tuple(range(len(rows), x.ndim)), tuple(range(first, w.ndim))
        return jax.lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=dtype)
    inner = math.prod(w.shape[first:])
    y = x.reshape(-1, inner) @ w.reshape(-1, inner).T
    return y.reshape(*rows, *w.shape[:first])
