"""How many steps a training step runs, drawn from a key: int32 [n], at least 1, before the cap.

`mean` is `config.model.recursions`, at which the model is evaluated. `probabilities` says how often
each number is drawn, for those who count what training costs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

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


# ---------------------------------------------------------------- how often


def _poisson_chances(rates: np.ndarray, weights: np.ndarray, most: int) -> list[float]:
    """P(1 + Poisson(rate) = 1, ..., most), the mean over rates with these weights."""
    n = np.arange(most)
    log_factorial = np.array([math.lgamma(i + 1) for i in n])
    chances = np.exp(np.outer(np.log(rates), n) - rates[:, None] - log_factorial)
    return list(weights @ chances)


def probabilities(config: RecursionConfig, recursions: int) -> tuple[float, ...]:
    """Chance of 1..most steps of a row in training; what would be more is `most`."""
    most, mean = config.most(recursions), recursions
    chances = [0.0] * most
    if config.sampling == "fixed":
        chances[mean - 1] = 1.0
    elif config.sampling == "uniform":
        chances = [1 / (2 * mean - 1) if n < 2 * mean - 1 else 0.0 for n in range(most)]
    elif config.sampling == "binomial":
        keep, skip = 1 - config.sampling_skip, config.sampling_skip
        chances = [
            math.comb(mean - 1, n) * keep**n * skip ** (mean - 1 - n)
            for n in range(min(mean, most))
        ] + [0.0] * (most - mean)
    elif config.sampling == "poisson":
        chances = _poisson_chances(np.array([mean - 1.0]), np.ones(1), most)
    else:  # lognormal_poisson: Gauss-Hermite quadrature over the logarithm of the rate
        x, weights = np.polynomial.hermite_e.hermegauss(32)
        sigma = config.sampling_sigma
        rates = np.exp(math.log(mean - 1) - sigma**2 / 2 + sigma * x)
        chances = _poisson_chances(rates, weights / weights.sum(), most)
    return (*map(float, chances[:-1]), 1.0 - float(sum(chances[:-1])))
