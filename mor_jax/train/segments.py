"""Training by segments with an optimiser step after each (HRM, arXiv 2506.21734; TRM, arXiv
2510.04871), for tasks whose answer stands where the question does.

A row stays in the batch over several steps. Each step runs one segment, all recursions of the model
once, from the state that the one before left, without a gradient into it, and learns from its
answer: cross-entropy, and a head that says whether the whole answer is right. A row whose head says
so, or that had its segments, gives its place to a new one. The head's parameters are "halt", beside
the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mor_jax.model.lm import LM, positions_in_document
from mor_jax.model.recursion.loss import gate_logits, init_gate
from mor_jax.nn.parameters import Tree
from mor_jax.train.state import TrainState
from mor_jax.train.step import averaged

DOUBT = -5.0  # bias of the halting head before training, as in TRM


class Carry(NamedTuple):
    """The rows of the batch, and how far they are."""

    tokens_BxT: jax.Array  # int32
    answers_BxT: jax.Array  # int32, of each token its own
    weights_BxT: jax.Array  # float32, 0: not asked for
    state_BxTxS: jax.Array
    ran_B: jax.Array  # int32, segments
    done_B: jax.Array  # bool: replaced before the next segment


Batch = dict[str, jax.Array]  # tokens, answers, weights: as in `Carry`
Step = Callable[[TrainState, Carry, Batch], tuple[TrainState, Carry, dict[str, jax.Array]]]


def init(lm: LM, key: jax.Array) -> Tree:
    """The model's parameters and the halting head's."""
    head = init_gate(jax.random.fold_in(key, 1), lm.model.width, lm.model.init_std)
    return lm.init(key) | {"halt": head | {"bias": jnp.full((1,), DOUBT)}}


def begin(lm: LM, batch: Batch) -> Carry:
    """A carry all of whose rows will be replaced."""
    rows, length = batch["tokens"].shape
    state = jnp.zeros((rows, length, lm.model.width * lm.loop.states), lm.model.dtype)
    none = jnp.zeros((rows,), jnp.int32)
    return Carry(batch["tokens"], batch["answers"], batch["weights"], state, none, none == 0)


def fresh(lm: LM, params: Tree, carry: Carry, batch: Batch) -> Carry:
    """With the rows that are done replaced by those of the batch, at their first states."""
    seg = jnp.ones_like(batch["tokens"])
    e = lm.enter(params, batch["tokens"], seg)
    pos = positions_in_document(seg)
    state = lm.loop.begin(params.get("recursion", {}), e, pos)
    new = Carry(
        batch["tokens"],
        batch["answers"],
        batch["weights"],
        state,
        jnp.zeros_like(carry.ran_B),
        jnp.zeros_like(carry.done_B),
    )

    def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(carry.done_B.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(chosen, new, carry)


def segment(
    lm: LM, params: Tree, tokens_BxT: jax.Array, state_BxTxS: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(state after it, final normalised states [B, T, D], logits [B] that the answer is right)."""
    seg = jnp.ones_like(tokens_BxT)
    e = lm.enter(params, tokens_BxT, seg)
    out = lm.run_steps(params, jax.lax.stop_gradient(state_BxTxS), e, seg)
    h = lm.leave(params, lm.loop.read(out.h_BxTxD), seg)
    return out.h_BxTxD, h, gate_logits(params["halt"], jnp.mean(h, axis=1))


def right(lm: LM, params: Tree, h: jax.Array, carry: Carry) -> jax.Array:
    """Which rows [B] have every answer that is asked for."""
    said = jnp.argmax(lm.logits(params, h), axis=-1)
    return jnp.all((said == carry.answers_BxT) | (carry.weights_BxT == 0), axis=-1)


def make_segment_step(
    lm: LM,
    tx: optax.GradientTransformation,
    *,
    segments: int,
    halt_weight: float = 0.5,
    explore: float = 0.1,
    decay: float = 1.0,
    ema: float = 0.0,
) -> Step:
    """(state, carry, batch) -> (state, carry, metrics); pure.

    Args:
      lm: its recursions are those of one segment; `recursion.gradient_steps` of them have a
        gradient.
      segments: of a row at most.
      halt_weight: of the halting head's loss.
      explore: share of rows that a step does not let halt early.
      decay: segment s weighs decay^(s - 1), their mean 1 (CGAR, arXiv 2511.08653).
      ema: of the running mean of the parameters, of a state that has one.
    """
    mean_weight = sum(decay**s for s in range(segments)) / segments

    def loss_of(params: Tree, carry: Carry) -> tuple[jax.Array, Any]:
        state, h, z_B = segment(lm, params, carry.tokens_BxT, carry.state_BxTxS)
        right_B = jax.lax.stop_gradient(right(lm, params, h, carry))
        asked_B = jnp.maximum(jnp.sum(carry.weights_BxT, axis=-1), 1.0)
        weight_B = decay ** carry.ran_B.astype(jnp.float32) / mean_weight
        weights = carry.weights_BxT * (weight_B / asked_B)[:, None] / asked_B.shape[0]
        answer = lm.cross_entropy(params, h, carry.answers_BxT, weights)
        halt = jnp.mean(optax.sigmoid_binary_cross_entropy(z_B, right_B.astype(jnp.float32)))
        return answer + halt_weight * halt, (state, right_B, z_B, answer, halt)

    def step(
        state: TrainState, carry: Carry, batch: Batch
    ) -> tuple[TrainState, Carry, dict[str, jax.Array]]:
        carry = fresh(lm, state.params, carry, batch)
        grads, (s, right_B, z_B, answer, halt) = jax.grad(loss_of, has_aux=True)(
            state.params, carry
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            average = averaged(average, params, ema, state.step)
        key = jax.random.fold_in(jax.random.key(0), state.step)
        waits_B = jax.random.uniform(key, z_B.shape) < explore
        ran_B = carry.ran_B + 1
        done_B = (ran_B >= segments) | ((z_B > 0) & ~waits_B)
        carry = carry._replace(state_BxTxS=jax.lax.stop_gradient(s), ran_B=ran_B, done_B=done_B)
        metrics = {
            "loss": answer,
            "halt_loss": halt,
            "right": jnp.mean(right_B.astype(jnp.float32)),
            "segments": jnp.sum(ran_B * done_B) / jnp.maximum(jnp.sum(done_B), 1),
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, params, opt_state, average), carry, metrics

    return step


def solve(lm: LM, params: Tree, batch: Batch, segments: int) -> tuple[jax.Array, jax.Array]:
    """(rows whose answer is right [S, B] after each of so many segments, logits of the halting
    head [S, B])."""
    carry = fresh(lm, params, begin(lm, batch), batch)

    def one(state: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        state, h, z_B = segment(lm, params, carry.tokens_BxT, state)
        return state, (right(lm, params, h, carry), z_B)

    return jax.lax.scan(one, carry.state_BxTxS, None, length=segments)[1]
