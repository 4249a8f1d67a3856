"""The blocks and the head of the model over single tokens, in the form that is fast when there are
few of them.

The arithmetic is `model/block.py`. Here are the two things that decoding does in its own way:
weights are prepared once, in the compute dtype and as plain [out, in] matrices, and each product is
written weight-stationary with float32 accumulation. XLA on CPUs runs that form of a bfloat16
product from the weights as they are; the usual one converts the whole matrix to float32 on every
call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

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


def prepare(lm: LM, params: Tree) -> Weights:
    """The parameters cast and flattened, once. A leaf that is right already is shared, not
    copied."""

    def leaf(path: tuple[DictKey, ...], w: jax.Array) -> jax.Array:
        name, group = path[-1].key, path[-2].key
        if name in nn.VECTORS:
            return w
        w = jnp.asarray(w, lm.model.dtype)
        if group not in ("attention", "mlp"):
            return w
        return w.reshape(-1, math.prod(w.shape[w.ndim - CONTRACTED.get(name, 1) :]))

    rest = {name: tree for name, tree in params.items() if name != "router"}
    return jax.tree_util.tree_map_with_path(leaf, rest) | {"router": params["router"]}


def dense(x: jax.Array, w: jax.Array, contract: int = 1, dtype: Any = None) -> jax.Array:
    """x [M, in...] times w [out..., in...] -> [M, O]; a `nn.dense.Product`."""
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
    x = network.embed(lm.model, weights, tokens_LxT, before_LxS, pos_LxT)
    return x.reshape(-1, x.shape[-1])


def logits(lm: LM, weights: Weights, x_MxD: jax.Array) -> jax.Array:
    """float32 [M, V] of what the coda returned."""
    return network.head(lm.model, weights, network.final_norm(lm.model, weights, x_MxD), dense)
