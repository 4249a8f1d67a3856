"""The blocks and the head of the model over single tokens, in the form that is fast when there are
few of them.

The arithmetic is `model/block.py`. Here are the two things that decoding does in its own way:
weights are prepared once, in the compute dtype and as plain [out, in] matrices, and each product is
written weight-stationary with float32 accumulation. XLA on CPUs runs that form of a bfloat16
product from the weights as they are; the usual one converts the whole matrix to float32 on every
call.

Two variants, chosen when the weights are prepared. On a mesh that cuts them (`placement.py`) their
axes stay apart, since flattening across an axis that is cut would gather it. And matrices may be
kept as `Int8`, a quarter to half of the bytes that decoding reads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey

from mor_jax import nn
from mor_jax.model import block as network
from mor_jax.model.block import Attend, Rope, Step
from mor_jax.model.lm import LM
from mor_jax.nn.parameters import Tree

# The tree of `LM.init`, prepared. Matrices of the blocks are [out, in], vectors and the router as
# they were.
Weights = dict[str, Any]
CONTRACTED = {"out": 3}  # trailing axes of a matrix that a product sums over, where it is not one
WeightFormat = Literal["compute", "int8"]


class Int8(NamedTuple):
    """A matrix [out..., in...] as integers -127..127 times a factor for each output."""

    q: jax.Array  # int8
    scale: jax.Array  # float32 [out..., 1...]


def contracted(path: Sequence[DictKey]) -> int:
    """Trailing axes that a product with this leaf sums over."""
    return CONTRACTED.get(path[-1].key, 1)


def is_matrix(path: Sequence[DictKey]) -> bool:
    """Whether this parameter is kept in the compute dtype: all but vectors and routers."""
    return path[0].key != "router" and path[-1].key not in nn.VECTORS


def is_quantized(path: Sequence[DictKey]) -> bool:
    """Whether "int8" is for this leaf: matrices of the blocks, the table, the head."""
    return path[-1].key == "table" or (
        path[-1].key not in nn.VECTORS and path[-2].key in ("attention", "mlp")
    )


def quantize(w: jax.Array, contract: int = 1) -> Int8:
    """Symmetric: the largest weight of each output becomes 127. No element is further from the
    original than half a step, its output's largest weight / 254."""
    axes = tuple(range(w.ndim - contract, w.ndim))
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return Int8(jnp.round(w / scale).astype(jnp.int8), scale)


def dequantize(w: Int8) -> jax.Array:
    """float32, as products with it see it."""
    return w.q.astype(jnp.float32) * w.scale


def rounded(params: Tree) -> Tree:
    """Parameters of `LM.init` as an engine with "int8" weights computes with them: to measure what
    the rounding costs."""

    def leaf(path: tuple[DictKey, ...], w: jax.Array) -> jax.Array:
        return dequantize(quantize(w, contracted(path))) if is_quantized(path) else w

    rest = {name: tree for name, tree in params.items() if name != "router"}
    return jax.tree_util.tree_map_with_path(leaf, rest) | {"router": params["router"]}


def prepare(lm: LM, params: Tree, weights: WeightFormat = "compute", flat: bool = True) -> Weights:
    """The parameters cast and flattened, once. A leaf that is right already is shared, not
    copied.

    Args:
      weights: "compute": in the compute dtype. "int8": matrices as `Int8`.
      flat: False: matrices keep their axes apart.
    """

    def leaf(path: tuple[DictKey, ...], w: jax.Array) -> jax.Array | Int8:
        name, group = path[-1].key, path[-2].key
        if name in nn.VECTORS:
            return w
        contract = contracted(path)
        if flat and group in ("attention", "mlp"):
            w, contract = w.reshape(-1, math.prod(w.shape[w.ndim - contract :])), 1
        if weights == "int8" and is_quantized(path):
            return quantize(w, contract)
        return jnp.asarray(w, lm.model.dtype)

    rest = {name: tree for name, tree in params.items() if name != "router"}
    return jax.tree_util.tree_map_with_path(leaf, rest) | {"router": params["router"]}


def dense(x: jax.Array, w: jax.Array | Int8, contract: int = 1, dtype: Any = None) -> jax.Array:
    """x [M, in...] times w [out..., in...] -> [M, O], or, where matrices keep their axes, [M,
    out...]; a `nn.dense.Product`."""
    if isinstance(w, Int8):
        y = dense(x, w.q.astype(x.dtype), contract, jnp.float32)
        return (y * w.scale.reshape(y.shape[1:])).astype(dtype or x.dtype)
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1:
        axes = tuple(range(1, x.ndim)), tuple(range(w.ndim - contract, w.ndim))
        y = jax.lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=jnp.float32)
        return y.astype(dtype or x.dtype)
    inner = math.prod(x.shape[x.ndim - contract :])
    x_MxI, w_OxI = x.reshape(-1, inner), w.reshape(-1, inner)
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if x_MxI.shape[0] == 1 and x.dtype == jnp.bfloat16:
        # One row misses the fast kernels, and of two, the weights go through faster as the second
        # operand.
        y_MxO = product(jnp.pad(x_MxI, ((0, 1), (0, 0))), w_OxI)[:1]
    else:
        y_MxO = product(w_OxI, x_MxI).T
    return y_MxO.astype(dtype or x.dtype)


def lookup(table: jax.Array | Int8, ids: jax.Array) -> jax.Array:
    """Rows of a table."""
    if isinstance(table, Int8):
        return dequantize(Int8(*(jnp.take(leaf, ids, axis=0) for leaf in table)))
    return jnp.take(table, ids, axis=0)


def blocks(
    lm: LM,
    weights: dict[str, Any],
    x_MxD: jax.Array,
    rope: Rope,
    attends: Sequence[Attend],
    repeat: int = 1,
    queries_only: bool = False,
    step: Step = 0,
) -> tuple[jax.Array, list[Any]]:
    """All blocks of a part, see `model.block.blocks`; `attends` and the extras: one an application.
    `step`: the recursion step of all rows or of each [M]; it says nothing to prelude and coda."""

    def one(w: Tree, x: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        return network.block(
            lm.model, w, x, rope, attend, step=step, queries_only=queries_only, product=dense
        )

    return network.blocks(one, weights, x_MxD, attends, repeat)


def embed(
    lm: LM,
    weights: Weights,
    tokens_LxT: jax.Array,
    pos_LxT: jax.Array,
    before_LxS: jax.Array | None,
) -> jax.Array:
    """States [L * T, D] of tokens that follow one another in L lanes, behind the tokens `before`
    (`block.embed`)."""
    x = network.embed(lm.model, weights, tokens_LxT, before_LxS, pos_LxT, lookup)
    return x.reshape(-1, x.shape[-1])


def logits(lm: LM, weights: Weights, x_MxD: jax.Array) -> jax.Array:
    """float32 [M, V] of what the coda returned; whole on every device, since a draw looks at all of
    them."""
    y = network.head(lm.model, weights, network.final_norm(lm.model, weights, x_MxD), dense)
    # Cut first, or else the compiler may gather the table and compute all of them everywhere.
    return lm.rules.constrain(lm.rules.constrain(y, None, "vocab"), None, None)
