"""What training asks of the steps: weights of the loss read out after each, given beforehand or by
a learned gate.

The S steps that have a gradient end at the row's last one. `index_SxB`: a row's own number of a
step from 0, negative before its first.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mor_jax.config import RecursionConfig
from mor_jax.nn.parameters import Tree

Weigh = Callable[[jax.Array, RecursionConfig], jax.Array]


def _final(index: jax.Array, config: RecursionConfig) -> jax.Array:
    """The last step alone."""
    return (index == index[-1:]).astype(jnp.float32)


def _uniform(index: jax.Array, config: RecursionConfig) -> jax.Array:
    """All alike."""
    return jnp.ones(index.shape, jnp.float32)


def _power(index: jax.Array, config: RecursionConfig) -> jax.Array:
    """t^power: later steps weigh more (RLTT, arXiv 2602.10520, has it among its weightings)."""
    return (jnp.maximum(index, 0) + 1.0) ** config.loss_power


def _decay(index: jax.Array, config: RecursionConfig) -> jax.Array:
    """decay^(t - 1): earlier steps weigh more (CGAR's hierarchical supervision, arXiv
    2511.08653)."""
    return config.loss_decay ** jnp.maximum(index, 0).astype(jnp.float32)


# (index_SxB, config) -> weights [S, B] before they are normalised; "gate" has a weight for each
# token, see below
CHOICES: dict[str, Weigh | None] = {
    "final": _final,
    "uniform": _uniform,
    "power": _power,
    "decay": _decay,
    "gate": None,
}


def step_weights(config: RecursionConfig, index_SxB: jax.Array) -> jax.Array:
    """[S, B], of each row summing to 1, 0 at steps that it does not run."""
    weigh = CHOICES[config.loss]
    assert weigh is not None, "the gate has a weight for each token"
    weights = jnp.where(index_SxB >= 0, weigh(index_SxB, config), 0.0)
    return weights / jnp.sum(weights, axis=0)


# ---------------------------------------------------------------- the learned gate


def init_gate(key: jax.Array, width: int, std: float) -> Tree:
    """Of one logit from the state after a step: the chance to stop there, given that no step before
    did."""
    return {"kernel": std * jax.random.normal(key, (1, width)), "bias": jnp.zeros((1,))}


def gate_logits(params: Tree, h: jax.Array) -> jax.Array:
    """[...] float32 of states [..., D]."""
    return h.astype(jnp.float32) @ params["kernel"][0] + params["bias"][0]


def log_stopping(z_SxBxT: jax.Array) -> jax.Array:
    """log p_t: p_t = sigmoid(z_t) prod_{j<t} (1 - sigmoid(z_j)), and the last step takes the rest
    (PonderNet, arXiv 2107.05407; Ouro, arXiv 2510.25741)."""
    stay = jax.nn.log_sigmoid(-z_SxBxT)
    before = jnp.cumsum(stay, axis=0) - stay
    return jnp.concatenate([before[:-1] + jax.nn.log_sigmoid(z_SxBxT[:-1]), before[-1:]])


def log_prior(config: RecursionConfig, steps: int) -> jax.Array:
    """[S]: uniform (then the divergence is log S less the entropy, Ouro's stage I), or geometric
    and cut off (PonderNet)."""
    if config.gate_prior == "uniform":
        return jnp.full((steps,), -jnp.log(steps))
    t = jnp.arange(steps)
    return jax.nn.log_softmax(jnp.log(config.gate_rate) + t * jnp.log1p(-config.gate_rate))


def divergence(log_p_SxBxT: jax.Array, log_prior_S: jax.Array) -> jax.Array:
    """KL(p || prior) of each token, [B, T] nats."""
    return jnp.sum(jnp.exp(log_p_SxBxT) * (log_p_SxBxT - log_prior_S[:, None, None]), axis=0)
