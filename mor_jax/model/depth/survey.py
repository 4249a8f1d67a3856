"""The survey: what a router's scores look like, kept while training so that depth can be dialled
afterwards.

For each recursion step, the share of its candidates whose score reaches each of a fixed set of
probes. That is the score's quantile function, kept as its inverse: counts above fixed probes add up
exactly over micro-batches and devices, where quantiles would need a sort of the whole batch. The
survey is a leaf of the router's parameters, moved by rule after each optimiser step (a running
mean) and never by a gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.errors import UserError
from mor_jax.nn.parameters import Tree

SURVEY = "survey"  # the leaf's name among the router's parameters
# Of the running mean, a step: the last twenty batches or so. A hundred lag behind the router of a
# short run.
DECAY = 0.95
_FINEST, _WIDEST, _COUNT = 1e-2, 512.0, 255
# Even near zero (steps of 9e-4), geometric beyond 0.01 (9 % apart); the first probe counts all
# candidates.
PROBES_G = np.concatenate(
    [[-np.inf], _FINEST * np.sinh(np.linspace(-1, 1, _COUNT) * np.arcsinh(_WIDEST / _FINEST))]
).astype(np.float32)


def empty(recursions: int) -> jax.Array:
    """[R, G] of a survey that has seen nothing."""
    return jnp.zeros((recursions, len(PROBES_G)), jnp.float32)


def count_above(score_BxT: jax.Array, counted_BxT: jax.Array) -> jax.Array:
    """[G] float32: how many of the counted scores reach each probe."""
    score = jnp.where(counted_BxT, jax.lax.stop_gradient(score_BxT), jnp.nan)  # NaN reaches nothing
    return jnp.sum(score[..., None] >= PROBES_G, axis=(0, 1), dtype=jnp.float32)


def continued(routers: Tree, above_RxG: jax.Array | None) -> Tree:
    """Router parameters whose survey, if they carry one, has seen one more batch."""
    if SURVEY not in routers:
        return routers
    assert above_RxG is not None, "what is surveyed is counted"
    return routers | {SURVEY: updated(routers[SURVEY], above_RxG)}


def updated(survey_RxG: jax.Array, above_RxG: jax.Array) -> jax.Array:
    """The survey after one more batch, of which `above_RxG` are the counts.

    Entries are shares of the batch's tokens. Starting from zeros shrinks all of them alike, and
    readers only look at ratios within a row, so the start needs no correction."""
    tokens = above_RxG[0, 0]
    new = DECAY * survey_RxG + (1 - DECAY) * above_RxG / jnp.maximum(tokens, 1.0)
    return jnp.where(tokens > 0, new, survey_RxG)


def reach(survey_RxG: np.ndarray) -> np.ndarray:
    """[R, G - 1]: share of each step's candidates whose score reaches the (finite) probes, falling
    along G.

    Raises UserError if the survey is empty."""
    survey = np.asarray(survey_RxG, np.float64)
    if not survey.size or not (survey[:, 0] > 0).all():
        raise UserError(
            "this checkpoint carries no survey of its router scores (it was written before there was one), so its mean "
            "depth cannot be dialled as it is; `mor_jax.inference.dial.calibrate` makes the survey from rows of text."
        )
    return survey[:, 1:] / survey[:, :1]


def share_above(reach_RxG: np.ndarray, score: float) -> np.ndarray:
    """[R]: share of each step's candidates whose score reaches this one."""
    return np.clip([np.interp(score, PROBES_G[1:], row) for row in reach_RxG], 0, 1)


def score_reached_by(share: float, reach_G: np.ndarray) -> float:
    """The score that this share of the candidates reaches; infinite for all (-) or none (+) of
    them."""
    if share >= 1:
        return -np.inf
    if share <= 0:
        return np.inf
    return float(np.interp(share, reach_G[::-1], PROBES_G[:0:-1]))


def thresholds(survey_RxG: jax.Array, kept_R: np.ndarray) -> jax.Array:
    """[R]: the scores that these shares of each step's candidates reach, traced; NaN where nothing
    was surveyed."""
    survey = jax.lax.stop_gradient(survey_RxG)
    reach_RxG = survey[:, 1:] / jnp.maximum(survey[:, :1], 1e-9)
    probes = jnp.asarray(PROBES_G[:0:-1])
    found = jax.vmap(lambda kept, reach: jnp.interp(kept, reach[::-1], probes))(
        jnp.asarray(kept_R), reach_RxG
    )
    found = jnp.where(kept_R >= 1, -jnp.inf, found)
    return jnp.where(survey[:, 0] > 0, found, jnp.nan).astype(jnp.float32)
