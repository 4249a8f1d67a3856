"""The blocks of the model over rows of tokens, written for decoding.

The same arithmetic as `nn.Block` (tests hold the two together), in the form that is fast when there are few rows:
weights are prepared once, in the compute dtype and as plain [out, in] matrices, and each product is written
weight-stationary with float32 accumulation. XLA on CPUs runs that form of a bfloat16 product from the weights as they
are; the usual one converts the whole matrix to float32 on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax import nn
from mor_jax.model.lm import LM
from mor_jax.nn.norm import rms_norm

# attend(q_MxKxGxH, k_MxKxH, v_MxKxH) -> (o_MxKxGxH, extra); k and v are None where queries alone are projected.
Attend = Callable[[jax.Array, jax.Array | None, jax.Array | None], tuple[jax.Array, Any]]


class Addition(NamedTuple):
    """A low-rank addition of every recursion to one projection, of all recursions as two matrices. A: the rank."""

    down: jax.Array  # [R * A, D]
    up: jax.Array  # [O, R * A]


class BlockWeights(NamedTuple):
    """One block. E = G + 2: query heads of a kv head, its key, its value. A norm is [D], or [R, D] where each recursion
    has its own; `encoding`, `query` and `value` are None where recursions have no such thing."""

    norm_1: jax.Array
    qkv: jax.Array  # [K * E * H, D]
    out: jax.Array  # [D, K * G * H]
    norm_2: jax.Array
    gate_up: jax.Array  # [2 * F, D]
    down: jax.Array  # [D, F]
    encoding_RxD: jax.Array | None = None  # factor on the state
    query: Addition | None = None
    value: Addition | None = None


class Weights(NamedTuple):
    """A model as the engine reads it."""

    table_VxD: jax.Array
    prelude: tuple[BlockWeights, ...]
    core: tuple[BlockWeights, ...]
    coda: tuple[BlockWeights, ...]
    norm_D: jax.Array
    router: Any  # the policy's, as it is


def prepare(lm: LM, params: dict) -> Weights:
    """The parameters cast and flattened, once. A leaf that is right already is shared, not copied."""
    dtype = lm.model.dtype

    def matrix(w, inner: int) -> jax.Array:
        return jnp.asarray(w, dtype).reshape(-1, inner)

    def addition(lora: dict | None, name: str) -> Addition | None:
        if lora is None:
            return None
        up = jnp.moveaxis(jnp.asarray(lora[f"{name}_up"], dtype), 0, -2)  # [..., R, A]
        steps, rank = up.shape[-2:]
        return Addition(matrix(lora[f"{name}_down"], lm.model.width), up.reshape(-1, steps * rank))

    def block(p: dict) -> BlockWeights:
        attention, mlp, (heads, _, head_dim) = p["attention"], p["mlp"], lm.model.dims
        own = p.get("own", {})
        scale = lambda name: (own | p)[name]["scale"]
        return BlockWeights(
            scale("norm_1"), matrix(attention["qkv"], lm.model.width), matrix(attention["out"], heads * head_dim),
            scale("norm_2"), matrix(mlp["gate_up"], lm.model.width), matrix(mlp["down"], lm.model.mlp_width),
            scale("encoding") if "encoding" in own else None,
            addition(own.get("lora"), "query"), addition(own.get("lora"), "value"),
        )  # fmt: skip

    part = lambda name: tuple(block(params[name][str(i)]) for i in range(len(params[name])))
    table = jnp.asarray(params["embed"]["table"], dtype)
    return Weights(table, part("prelude"), part("core"), part("coda"), params["norm"]["scale"], params["router"])


def dense(x_MxI: jax.Array, w_OxI: jax.Array) -> jax.Array:
    """float32 [M, O]."""
    product = lambda x, y: jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if x_MxI.shape[0] == 1 and x_MxI.dtype == jnp.bfloat16:
        # One row misses the fast kernels, and of two, the weights go through faster as the second operand.
        return product(jnp.pad(x_MxI, ((0, 1), (0, 0))), w_OxI)[:1]
    return product(w_OxI, x_MxI).T


def rotate(x_MxAxH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of float32 rows; the table is [M, H / 2]."""
    cos, sin = (t.reshape(t.shape[0], *(1,) * (x_MxAxH.ndim - 2), t.shape[1]) for t in rope)
    first, second = jnp.split(x_MxAxH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _added(lm: LM, addition: Addition, x_MxD: jax.Array, step: jax.Array | int) -> jax.Array:
    """What the recursion of each row adds, [M, O]. The matrices of all recursions are applied, and the others' part is
    left out between the two: ranks are small, and no weights are gathered for each row."""
    of_rank = jnp.arange(addition.down.shape[0]) // lm.model.lora_rank
    hidden = dense(x_MxD, addition.down).astype(x_MxD.dtype)
    mine = jnp.where(of_rank == jnp.reshape(step, (-1, 1)), hidden, 0)
    return dense(mine, addition.up).astype(x_MxD.dtype)


def block(
    lm: LM, w: BlockWeights, x_MxD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend,
    queries_only: bool = False, step: jax.Array | int = 0,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """One block over M rows; (y_MxD, what `attend` returned beside its output). `step`: the recursion step it is applied
    for, from 0, of all rows or of each [M]."""
    heads, kv_heads, head_dim = lm.model.dims
    groups, rows, dtype, eps = heads // kv_heads, x_MxD.shape[0], x_MxD.dtype, lm.model.norm_eps
    qkv, own = w.qkv, lambda scale: scale if scale.ndim == 1 else scale[step]
    if w.encoding_RxD is not None:
        x_MxD = x_MxD * own(w.encoding_RxD).astype(dtype)
    if queries_only:
        qkv = qkv.reshape(kv_heads, groups + 2, -1)[:, :groups].reshape(-1, qkv.shape[1])
    # Rounded to the compute dtype where `nn.Block` does.
    n_MxD = rms_norm(x_MxD, own(w.norm_1), eps)
    h = dense(n_MxD, qkv).astype(dtype).reshape(rows, kv_heads, -1, head_dim)
    if w.query is not None:
        h = h.at[:, :, :groups].add(_added(lm, w.query, n_MxD, step).reshape(rows, kv_heads, groups, head_dim))
    if w.value is not None and not queries_only:
        h = h.at[:, :, groups + 1].add(_added(lm, w.value, n_MxD, step).reshape(rows, kv_heads, head_dim))
    turn = lambda x: rotate(x.astype(jnp.float32), rope).astype(dtype)
    q, k, v = turn(h[:, :, :groups]), None, None
    if not queries_only:
        k, v = turn(h[:, :, groups]), h[:, :, groups + 1]
    o_MxKxGxH, extra = attend(q, k, v)
    x = x_MxD + dense(o_MxKxGxH.reshape(rows, -1), w.out).astype(dtype)
    gate, up = jnp.split(dense(rms_norm(x, own(w.norm_2), eps), w.gate_up).astype(dtype), 2, axis=-1)
    return x + dense(jax.nn.silu(gate) * up, w.down).astype(dtype), extra


def blocks(
    lm: LM, weights: Sequence[BlockWeights], x_MxD: jax.Array, rope: tuple[jax.Array, jax.Array],
    attends: Sequence[Attend], repeat: int = 1, queries_only: bool = False, step: jax.Array | int = 0,
) -> tuple[jax.Array, list]:  # fmt: skip
    """All blocks of a part, each `repeat` times in place; `attends` and the extras: one an application. `step`: see
    `block`; it says nothing to prelude and coda."""
    extras = []
    for n, attend in enumerate(attends):
        x_MxD, extra = block(lm, weights[n // repeat], x_MxD, rope, attend, queries_only, step)
        extras.append(extra)
    return x_MxD, extras


def rope_of(lm: LM, pos_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) [M, H / 2] of rows at these positions."""
    cos, sin = nn.rope_table(pos_M[None], lm.model.dims[2], lm.model.rope_theta)
    return cos[0], sin[0]


def embed(lm: LM, weights: Weights, token_M: jax.Array) -> jax.Array:
    """States [M, D] of tokens."""
    return jnp.take(weights.table_VxD, token_M, axis=0).astype(lm.model.dtype)


def logits(lm: LM, weights: Weights, x_MxD: jax.Array) -> jax.Array:
    """float32 [M, V] of what the coda returned."""
    return dense(rms_norm(x_MxD, weights.norm_D, lm.model.norm_eps), weights.table_VxD)
