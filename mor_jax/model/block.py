"""The arithmetic of the network, once: embedding, Transformer block, head. Pure functions of
arrays.

Training, the plain decode and the engine call the same functions. They differ in what they pass in:

* `x`: whole rows [B, T, D], or single tokens [M, D] (the engine: one a lane, or a chunk of a
  prompt).
* `attend`: who attends to what, and where keys and values are kept.
* `product`: how a matrix product is computed and how its weight lies, see `nn.dense.Product`. With
  `dense`, weights are the parameters as `LM.init` returns them. Another product may read weights
  prepared for it; the block only asks that their elements are in the same order, and says itself
  what shape it reads.

Letters: D width, K kv heads, G query heads a kv head, E = G + 2 (query heads, key, value), H head
dim, F mlp width, V vocabulary, R recursions, A rank of an addition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.nn.dense import Product, dense
from mor_jax.nn.mlp import swiglu
from mor_jax.nn.norm import rms_norm
from mor_jax.nn.parameters import Tree
from mor_jax.nn.rope import apply_rope

# attend(q_BxKxGxTxH, k_BxKxTxH, v_BxKxTxH) -> (o_BxKxGxTxH, extra); of single tokens q_MxKxGxH,
# k_MxKxH, v_MxKxH -> o_MxKxGxH. Keys are rotated. A training row, a prefill or one decode step are
# three such functions. Where a block projects queries only, k and v are None.
Attend = Callable[[jax.Array, jax.Array | None, jax.Array | None], tuple[jax.Array, Any]]
Params = Tree
# `block` with all but these three arguments given
ApplyBlock = Callable[[Params, jax.Array, Attend], tuple[jax.Array, Any]]
Rope = tuple[jax.Array, jax.Array]  # cos, sin: [B, T, H / 2], or [M, H / 2] of single tokens
Step = jax.Array | int | None  # recursion step from 0: of all rows, or [B] (or [M]) of each


@dataclass(frozen=True)
class EachBlock:
    """Attention of blocks that each look at something of their own."""

    make: Callable[[Any], Attend]
    kept: Sequence[Any]  # what each application of a block looks at, in order


def lookup(table_VxD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [..., D] of a table."""
    return jnp.take(table_VxD, ids, axis=0)


def embed(
    m: ModelConfig,
    params: Params,
    tokens: jax.Array,
    before: jax.Array | None = None,
    pos: jax.Array | None = None,
    lookup: Callable[[Any, jax.Array], jax.Array] = lookup,
) -> jax.Array:
    """States [..., D] of tokens [...], in the compute dtype.

    With `m.smear` = S each is e_t + sum of smear_i * e_(t - i) over i = 1..S within its document: a
    causal depth-wise convolution of the embeddings, so that one match of attention compares several
    tokens.

    Args:
      tokens: with smear [..., T], one after the other.
      before: read by smear: the S tokens before them, [..., S]; any ids where there are none.
      pos: read by smear: positions of the tokens in their documents, [..., T].
      lookup: reads a table that was prepared, as `product` does in a block.
    """
    if not m.smear:
        return lookup(params["embed"]["table"], tokens).astype(m.dtype)
    assert before is not None and pos is not None, "smearing reads them"
    count, mix_SxD = tokens.shape[-1], params["embed"]["smear"].astype(m.dtype)
    near = jnp.concatenate([before, tokens], axis=-1)
    e = lookup(params["embed"]["table"], near).astype(m.dtype)
    x = e[..., m.smear :, :]
    for i in range(1, m.smear + 1):
        first = m.smear - i
        x += jnp.where(pos[..., None] >= i, e[..., first : first + count, :] * mix_SxD[i - 1], 0)
    return x


def block(
    m: ModelConfig,
    params: Params,
    x: jax.Array,
    rope: Rope,
    attend: Attend,
    *,
    step: Step = None,
    queries_only: bool = False,
    product: Product = dense,
) -> tuple[jax.Array, Any]:
    """One Llama block, residuals included: x + attention(norm(x)), then + mlp(norm(.)); or with its
    norms elsewhere, see `_joined`.

    Args:
      params: {attention, mlp, norm_1, norm_2, ...} as `nn.Block` declares them. In a relaxed core
        also "own", leaves [R, ...]: what each recursion has of its own, each part optional:
        "encoding" a factor on the state, "norm_1" and "norm_2" in place of the shared ones, "lora"
        an addition to the query and value projections (`nn.Lora`).
      x: states [B, T, D] or [M, D] in the compute dtype. Products and residuals have that dtype;
        norms, rotation and softmax are computed in float32.
      step: the recursion step the block is applied for; needed where there is an "own".
      queries_only: project queries alone; `attend` gets None for keys and values.
    Returns:
      (states like x, what `attend` returned beside its output).
    Raises:
      ValueError: a relaxed block without a step.
    """
    own = params.get("own", {})
    if own and step is None:
        raise ValueError("a relaxed core must be told which recursion it is applied for")

    number = 0 if step is None else step  # read where there is an "own" alone

    def scale(name: str) -> jax.Array:
        return _of_step(own[name]["scale"], number, x) if name in own else params[name]["scale"]

    if "encoding" in own:
        x = x * scale("encoding").astype(x.dtype)
    pre = m.norm_placement != "post"
    n = rms_norm(x, scale("norm_1"), m.norm_eps) if pre else x
    add = _addition(n, own["lora"], number, queries_only, product) if "lora" in own else None
    a, extra = attention(
        m, params["attention"], n, rope, attend, add=add, queries_only=queries_only, product=product
    )
    x = _joined(m, params, x, a, 1, scale)
    n = rms_norm(x, scale("norm_2"), m.norm_eps) if pre else x
    return _joined(m, params, x, mlp(params["mlp"], n, product), 2, scale), extra


def _joined(
    m: ModelConfig,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    n: int,
    scale: Callable[[str], jax.Array],
) -> jax.Array:
    """The state x and the n-th branch y: x + y, and whatever norm stands here.

    * sandwich_in: x + norm(y) (Ouro, arXiv 2510.25741).
    * sandwich_out: norm(x + y) (Huginn, arXiv 2502.05171).
    * post: norm(x + y) by the block's own first norms, nothing before the branch (the original
      Transformer).

    A factor on y holds a residual back, as in CaiT's LayerScale (arXiv 2103.17239).
    """
    if f"branch_{n}" in params:
        y = y * params[f"branch_{n}"]["scale"].astype(y.dtype)
    if m.norm_placement == "pre":
        return x + y
    if m.norm_placement == "sandwich_in":
        return x + rms_norm(y, params[f"after_{n}"]["scale"], m.norm_eps)
    return rms_norm(
        x + y, scale(f"norm_{n}" if m.norm_placement == "post" else f"after_{n}"), m.norm_eps
    )


def attention(
    m: ModelConfig,
    params: Params,
    x: jax.Array,
    rope: Rope,
    attend: Attend,
    *,
    add: jax.Array | None = None,
    queries_only: bool = False,
    product: Product = dense,
) -> tuple[jax.Array, Any]:
    """Grouped-query attention with its projections. `add`: what is added to the fused projection,
    [..., K, E, H]."""
    heads, kv_heads, head_dim = m.dims
    groups, rows = heads // kv_heads, x.shape[:-1]
    qkv = params["qkv"]
    if queries_only:  # the G query heads of each kv head lie before its key and its value
        qkv = jax.tree.map(lambda w: w.reshape(kv_heads, groups + 2, head_dim, -1)[:, :groups], qkv)
    h = product(x, qkv).reshape(*rows, kv_heads, -1, head_dim)  # [..., K, E, H]
    if "bias" in params:
        h += params["bias"][:, : h.shape[-2]].astype(h.dtype)
    if add is not None:
        h += add
    # Attention works on all tokens of a head at once, so heads come before time. Single tokens have
    # no time axis.
    h = jnp.moveaxis(h, 1, 3) if x.ndim == 3 else h

    def rotated(part: jax.Array, norm: str) -> jax.Array:
        """Queries or keys as attention reads them."""
        part = rms_norm(part, params[norm]["scale"], m.norm_eps) if norm in params else part
        return apply_rope(part, *rope)

    q, k, v = rotated(h[:, :, :groups], "q_norm"), None, None
    if not queries_only:
        k, v = rotated(h[:, :, groups], "k_norm"), h[:, :, groups + 1]
    o, extra = attend(q, k, v)
    o = jnp.moveaxis(o, 3, 1) if x.ndim == 3 else o  # [..., K, G, H]
    return product(o, params["out"], contract=3), extra


def mlp(params: Params, x: jax.Array, product: Product = dense) -> jax.Array:
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""
    gate_up = product(x, params["gate_up"]).reshape(*x.shape[:-1], 2, -1)  # [..., 2, F]
    return product(swiglu(gate_up), params["down"])


def blocks(
    one: ApplyBlock,
    params: Mapping[str, Params],
    x: jax.Array,
    attend: Attend | EachBlock | Sequence[Attend],
    repeat: int = 1,
) -> tuple[jax.Array, list[Any]]:
    """All blocks of one part in order, each `repeat` times in place; the `extra` of every
    application as a list.

    Args:
      params: of the blocks "0", "1", ...
      attend: one for all applications, or one for each.

    Unrolled, and the oracle of `model.stack.run_stack`.
    """
    if isinstance(attend, EachBlock):
        attend = [attend.make(kept) for kept in attend.kept]
    extras = []
    for n, attend_n in enumerate([attend] * (len(params) * repeat) if callable(attend) else attend):
        x, extra = one(params[str(n // repeat)], x, attend_n)
        extras.append(extra)
    return x, extras


def final_norm(m: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """States as the head reads them."""
    return rms_norm(x, params["norm"]["scale"], m.norm_eps)


def head(m: ModelConfig, params: Params, h: jax.Array, product: Product = dense) -> jax.Array:
    """float32 logits [..., V] of normalised states [..., D]."""
    return finish(m, product(h, head_table(params), dtype=jnp.float32))


def head_table(params: Params) -> jax.Array:
    """The table [V, D] that states are multiplied with: the head's own, or, if input and output are
    tied, the embedding's."""
    return params["head" if "head" in params else "embed"]["table"]


def finish(m: ModelConfig, products: jax.Array) -> jax.Array:
    """Logits from the products of states and table, element by element. The loss differentiates it
    (`model/loss.py`).

    A soft cap holds them within +-logit_cap, smoothly (Gemma 2, arXiv 2408.00118, section 2)."""
    return m.logit_cap * jnp.tanh(products / m.logit_cap) if m.logit_cap else products


def _of_step(leaf: jax.Array, step: jax.Array | int, x: jax.Array) -> jax.Array:
    """The part [D] of this step from [R, D]. Of a step for each row: [B, D], with axes put in to go
    with x."""
    mine = leaf[step]
    return (
        mine if mine.ndim == 1 else mine.reshape(mine.shape[0], *(1,) * (x.ndim - 2), mine.shape[1])
    )


def _addition(
    x: jax.Array, lora: Params, step: jax.Array | int, queries_only: bool, product: Product
) -> jax.Array:
    """What a recursion adds to the fused projection: to its queries and its value, not to its
    key."""
    query = _low_rank(x, lora["query_down"], lora["query_up"], step, product)
    if queries_only:
        return query
    value = _low_rank(x, lora["value_down"], lora["value_up"], step, product)[..., None, :]
    return jnp.concatenate([query, jnp.zeros_like(value), value], axis=-2)


def _low_rank(
    x: jax.Array, down_RxAxD: jax.Array, up: jax.Array, step: jax.Array | int, product: Product
) -> jax.Array:
    """[..., out...] = x down^T up^T of this step; up is [R, out..., A].

    Of a step for each row, the matrices of all steps are applied, and between the two what is not
    of the row's own step is set to zero: ranks are small, and no weights are gathered for each row.
    """
    rows, out = x.shape[:-1], up.shape[1:-1]
    if jnp.ndim(step) == 0:
        return product(product(x, down_RxAxD[step]), up[step]).reshape(*rows, *out)
    count, rank, _ = down_RxAxD.shape
    hidden = product(x, down_RxAxD).reshape(*rows, count, rank)
    mine = jnp.reshape(step, (-1, *(1,) * (hidden.ndim - 1))) == jnp.arange(count)[:, None]
    hidden = jnp.where(mine, hidden, 0)
    parts = [product(hidden[..., r, :], up[r]) for r in range(count)]
    return sum(parts[1:], parts[0]).reshape(*rows, *out)
