"""How many steps a training step runs, drawn from a key: int32 [n], at least 1, before the cap.

`mean` is `config.model.recursions`, at which the model is evaluated."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mor_jax.config import RecursionConfig

SEED = 0x5EED


def _fixed(key: jax.Array, n: int, mean: int, config: RecursionConfig) -> jax.Array:
    return jnp.full((n,), mean, jnp.int32)


def _lognormal_poisson(key: jax.Array, n: int, mean: int, config: RecursionConfig) -> jax.Array:
    """1 + Poisson of a log-normal rate (Huginn, arXiv 2502.05171). The rate's mean is one less than
    the mean wanted."""
    rate_key, key = jax.random.split(key)
    sigma = config.sampling_sigma
    log_rate = math.log(mean - 1) - sigma**2 / 2 + sigma * jax.random.normal(rate_key, (n,))
    return 1 + jax.random.poisson(key, jnp.exp(log_rate), (n,), jnp.int32)


def _poisson(key: jax.Array, n: int, mean: int, config: RecursionConfig) -> jax.Array:
    """1 + Poisson(mean - 1) (Parcae, arXiv 2604.12946, draws it for each sequence)."""
    return 1 + jax.random.poisson(key, mean - 1, (n,), jnp.int32)


def _binomial(key: jax.Array, n: int, mean: int, config: RecursionConfig) -> jax.Array:
    """Each round after the first is left out with chance `sampling_skip`: stochastic RINS (arXiv
    2502.07503). Here `config.model.recursions` is the most, not the mean."""
    kept = jax.random.bernoulli(key, 1 - config.sampling_skip, (n, mean - 1))
    return 1 + jnp.sum(kept, axis=-1, dtype=jnp.int32)


def _uniform(key: jax.Array, n: int, mean: int, config: RecursionConfig) -> jax.Array:
    """Every number from 1 to 2 mean - 1 alike."""
    return jax.random.randint(key, (n,), 1, 2 * mean, jnp.int32)


# (key, n, mean, config) -> [n]
CHOICES = {
    "fixed": _fixed,
    "lognormal_poisson": _lognormal_poisson,
    "poisson": _poisson,
    "binomial": _binomial,
    "uniform": _uniform,
}


def draw(config: RecursionConfig, recursions: int, step: jax.Array, rows: int) -> jax.Array:
    """Steps of each row of the batch of optimiser step `step` (from 0), [rows] int32: a function of
    the number of the step, hence the same after a restart, under any accumulation and on any
    mesh."""
    key = jax.random.fold_in(jax.random.key(SEED), step)
    n = rows if config.sampling_scope == "sequence" else 1
    found = jnp.minimum(
        CHOICES[config.sampling](key, n, recursions, config), config.most(recursions)
    )
    return jnp.broadcast_to(found, (rows,))
