"""Histograms of router scores, from the counts that the survey takes anyway.

The counts say how many candidates reach each probe; differences between two probes are a histogram.
Edges are the probes nearest to even steps of sigmoid(z), so that a histogram has the axis on which
the threshold of expert-choice lies at 0.5. Under token-choice the counted number is a token's pull
to the depth, and 0.5 is where it goes on as well.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.model.depth.survey import PROBES_G

BINS = 20  # of sigmoid(z) in [0, 1]


def _edges() -> np.ndarray:
    inner = np.arange(1, BINS) / BINS
    probes = 1 / (1 + np.exp(-PROBES_G[1:].astype(np.float64)))
    return 1 + np.abs(probes[None] - inner[:, None]).argmin(axis=1)


EDGES = _edges()  # of the inner edges: their indices among the probes


def histogram(above_RxG: jax.Array) -> jax.Array:
    """[R, BINS] float32: share of each step's candidates whose score lies in each bin; zeros where
    there are none."""
    total = above_RxG[:, :1]
    reached = jnp.concatenate([total, above_RxG[:, EDGES], jnp.zeros_like(total)], axis=1)
    return -jnp.diff(reached, axis=1) / jnp.maximum(total, 1.0)
