"""Next-token cross-entropy straight from hidden states, without the logits of a whole batch in
memory.

`cross_entropy_sum` walks over chunks of positions. When it is differentiated, the gradients with
respect to the hidden states and the table are formed in the same walk, while a chunk's logits are
at hand, and only scaled in the backward pass: three matrix products per chunk, as many as with
stored logits (recomputing would take four). Softmax and loss are float32.

Both functions take the head apart: logits = finish(products of states and table), where `finish`
works element by element (`model.block.finish`; by default nothing is done). `LM.cross_entropy` and
`LM.token_nll` call them with what the model says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.nn.dense import dense

Finish = Callable[[jax.Array], jax.Array]
Chunks = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array
]  # states, targets, weights, the teacher's states


def _as_it_is(products: jax.Array) -> jax.Array:
    return products


def next_token_targets(
    tokens_BxT: jax.Array, segment_ids_BxT: jax.Array, weights_BxT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(targets, weights) [B, T]: position t predicts t + 1 if both belong to the same document;
    padding is 0.

    `weights_BxT`: of the loss of predicting each token, any float; None: 1."""
    targets = jnp.pad(tokens_BxT[:, 1:], ((0, 0), (0, 1)))
    same = (segment_ids_BxT[:, 1:] == segment_ids_BxT[:, :-1]) & (segment_ids_BxT[:, 1:] > 0)
    weights = (
        same.astype(jnp.float32)
        if weights_BxT is None
        else jnp.where(same, weights_BxT[:, 1:], 0.0)
    )
    return targets, jnp.pad(weights, ((0, 0), (0, 1)))


def _chunks(x_BxTxX: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...]; time is padded with zeros up to a multiple."""
    length = x_BxTxX.shape[1]
    pad = -length % chunk
    x = jnp.pad(x_BxTxX, ((0, 0), (0, pad)) + ((0, 0),) * (x_BxTxX.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _unchunk(x: jax.Array, length: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _products(h: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """float32 [..., V] of states [..., D]."""
    return dense(h, table_VxD, dtype=jnp.float32)


def _nll(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], lse


def token_nll(
    h_BxTxD: jax.Array,
    table_VxD: jax.Array,
    targets_BxT: jax.Array,
    chunk: int = 0,
    finish: Finish = _as_it_is,
) -> jax.Array:
    """Negative log-likelihood of each target in nats, [B, T] float32."""
    length = h_BxTxD.shape[1]
    chunk = min(chunk or length, length)

    def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _nll(finish(_products(args[0], table_VxD)), args[1])[0]

    return _unchunk(
        jax.lax.map(one, (_chunks(h_BxTxD, chunk), _chunks(targets_BxT, chunk))), length
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    h_BxTxD: jax.Array,
    table_VxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    chunk: int = 0,
    finish: Finish = _as_it_is,
) -> jax.Array:
    """Weighted sum of next-token losses in nats (float32 scalar).

    `chunk` positions at a time have logits (0: all). Differentiable in the states and the table,
    once.
    """
    return jnp.sum(token_nll(h_BxTxD, table_VxD, targets_BxT, chunk, finish) * weights_BxT)


def _cross_entropy_fwd(
    h: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    chunk: int,
    finish: Finish,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Products see p = exp(logits - max) as it is, without the target's entry: dividing by its sum
    is left to the small factors, and the target's own term, where p - 1 would cancel, is added
    apart as one row a token. The table's gradient is gathered as [D, V], from states transposed
    beforehand, so that every product is one of plain row-major matrices: XLA on CPUs runs `p.T @ h`
    at 0.6 of the speed. Where `finish` does something, both terms are pulled back through it, each
    at its own place."""
    length = h.shape[1]
    chunk = min(chunk or length, length)
    w = table.astype(h.dtype)
    vocab = jnp.arange(table.shape[0])

    def one(
        dtable_DxV: jax.Array, xs: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        h_NxD, h_DxN, t_N, weight_N = xs
        products_NxV = _products(h_NxD, w)
        logits_NxV, pull = jax.vjp(finish, products_NxV)
        top_N = jnp.max(logits_NxV, axis=-1)
        own_logit_N, pull_own = jax.vjp(
            finish, jnp.take_along_axis(products_NxV, t_N[:, None], axis=-1)[:, 0]
        )
        hit_N = own_logit_N - top_N
        p32_NxV = jnp.where(t_N[:, None] == vocab, 0.0, jnp.exp(logits_NxV - top_N[:, None]))
        p_NxV, others_N = pull(p32_NxV)[0].astype(h.dtype), jnp.sum(p32_NxV, axis=-1)
        sum_N = others_N + jnp.exp(hit_N)
        scale_N, own_N = weight_N / sum_N, pull_own(-weight_N * others_N / sum_N)[0]
        dh_NxD = jnp.matmul(p_NxV, w, preferred_element_type=jnp.float32) * scale_N[:, None]
        scaled_DxN = (h_DxN * scale_N).astype(h.dtype)
        dtable_DxV += jnp.matmul(scaled_DxN, p_NxV, preferred_element_type=jnp.float32)
        return dtable_DxV, (jnp.sum((jnp.log(sum_N) - hit_N) * weight_N), dh_NxD, own_N)

    # [chunks, B, chunk, ...] -> [chunks, N, ...]
    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    h_CxNxD, t_CxN, weight_CxN = (flat(_chunks(x, chunk)) for x in (h, targets, weights))
    xs = (h_CxNxD, h_CxNxD.swapaxes(1, 2), t_CxN, weight_CxN)
    dtable_DxV, (loss, dh, own) = jax.lax.scan(one, jnp.zeros(table.shape[::-1], jnp.float32), xs)
    # A single chunk is no loop to XLA, which then folds the transposition below into the product;
    # of bfloat16 on CPUs it has none in that form.
    dtable_DxV = jax.lax.optimization_barrier(dtable_DxV)
    own = own[..., None]
    dh = (dh + own * w[t_CxN]).astype(h.dtype)
    dtable = dtable_DxV.T.at[t_CxN].add(own * h_CxNxD)
    dh = _unchunk(dh.reshape(-1, h.shape[0], chunk, h.shape[2]), length)
    return jnp.sum(loss), (dh, dtable.astype(table.dtype))


def _cross_entropy_bwd(
    chunk: int, finish: Finish, residuals: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dh, dtable = residuals
    return (g * dh).astype(dh.dtype), (g * dtable).astype(dtable.dtype), None, None


cross_entropy_sum.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


class Mix(NamedTuple):
    """How a model learns from a teacher: static arguments of `distilled_sum`."""

    weight: float  # of the distillation loss; the next-token loss has the rest
    temperature: float  # T
    chunk: int = 0  # positions whose logits exist at once; 0: all
    finish: Finish = _as_it_is
    teacher_finish: Finish = _as_it_is


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def distilled_sum(
    h_BxTxD: jax.Array,
    table_VxD: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    teacher_h_BxTxE: jax.Array,
    teacher_table_VxE: jax.Array,
    mix: Mix,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, nll, distillation), weighted sums over the targets, in nats.

    nll is that of `cross_entropy_sum`; the distillation loss of a target is T^2 KL(p, q), p the
    teacher's and q the model's distribution at temperature T (Hinton et al., arXiv 1503.02531: T^2
    keeps the gradient's size). A target whose weight is negative has none. loss = (1 - weight) nll
    + weight distillation, differentiable in the states and the table, once; the other two are
    figures without a gradient. Chunks and gradients as in `cross_entropy_sum`.
    """
    table, teacher_table = (
        table_VxD.astype(h_BxTxD.dtype),
        teacher_table_VxE.astype(teacher_h_BxTxE.dtype),
    )
    chunks = _distilled_chunks(h_BxTxD, targets_BxT, weights_BxT, teacher_h_BxTxE, mix.chunk)

    def one(xs: Chunks) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return _distilled(xs[0], table, *xs[1:], teacher_table, mix)

    sums = jax.lax.map(one, chunks)
    loss, (nll, distillation) = jax.tree.map(jnp.sum, sums)
    return loss, nll, distillation


def _distilled_chunks(
    h: jax.Array, targets: jax.Array, weights: jax.Array, teacher_h: jax.Array, chunk: int
) -> Chunks:
    size = min(chunk or h.shape[1], h.shape[1])
    return (
        _chunks(h, size),
        _chunks(targets, size),
        _chunks(weights, size),
        _chunks(teacher_h, size),
    )


def _distilled(
    h: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher_h: jax.Array,
    teacher_table: jax.Array,
    mix: Mix,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(loss, (nll, distillation)) of one chunk."""
    logits = mix.finish(_products(h, table))
    taught = mix.teacher_finish(_products(teacher_h, teacher_table)) / mix.temperature
    nll = jnp.sum(_nll(logits, targets)[0] * weights)
    log_p, log_q = jax.nn.log_softmax(taught), jax.nn.log_softmax(logits / mix.temperature)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    distillation = mix.temperature**2 * jnp.sum(kl * jnp.maximum(weights, 0.0))
    return (1 - mix.weight) * nll + mix.weight * distillation, (nll, distillation)


def _distilled_fwd(
    h: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher_h: jax.Array,
    teacher_table: jax.Array,
    mix: Mix,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The gradients are formed while a chunk's logits are at hand."""
    small, teacher_small = table.astype(h.dtype), teacher_table.astype(teacher_h.dtype)
    grad = jax.value_and_grad(_distilled, argnums=(0, 1), has_aux=True)

    def one(dtable: jax.Array, xs: Chunks) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        (loss, parts), (dh, d) = grad(xs[0], small, *xs[1:], teacher_small, mix)
        return dtable + d.astype(jnp.float32), (loss, *parts, dh)

    chunks = _distilled_chunks(h, targets, weights, teacher_h, mix.chunk)
    dtable, (loss, nll, distillation, dh) = jax.lax.scan(
        one, jnp.zeros(table.shape, jnp.float32), chunks
    )
    sums = jnp.sum(loss), jnp.sum(nll), jnp.sum(distillation)
    return sums, (_unchunk(dh, h.shape[1]), dtable.astype(table.dtype))


def _distilled_bwd(
    mix: Mix,
    residuals: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None, None, None]:
    dh, dtable = residuals
    g = cotangents[0]
    return (g * dh).astype(dh.dtype), (g * dtable).astype(dtable.dtype), None, None, None, None


distilled_sum.defvjp(_distilled_fwd, _distilled_bwd)
