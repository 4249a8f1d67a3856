"""What a depth policy is: the small object that decides, token by token, who runs each recursion step.

A policy is a frozen dataclass (hashable, static under jit). The executors in `model/recurse.py` call it; it never
sees the blocks. `begin` looks at the states before the first step and returns a `Route`; every step then reads its
own slice of `Route.steps` and the tokens' slice of `Route.tokens`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.errors import UserError
from mor_jax.parallel.rows import mine, whole


class RouterStats(NamedTuple):
    """Sums over the real tokens of a batch, one entry a recursion step: leaves [R] (or as said), float32."""

    aux: jax.Array  # auxiliary loss over candidates
    candidates: jax.Array  # tokens that could run the step
    selected: jax.Array  # tokens that ran it
    agree: jax.Array  # candidates for which the causal rule and the selection agree
    score: jax.Array  # sum of the score, before alpha, over candidates
    score_sq: jax.Array  # and of its square
    z_sq: jax.Array  # sum of logsumexp(z)^2 over candidates (of the one router's logits, at the first step only)
    overlap: jax.Array  # tokens that ran it and that the rival of the router (expert-choice: the auxiliary) would take
    above: jax.Array | None = None  # [R, G]: candidates whose score reaches each probe (`survey.PROBES_G`)


class Route(NamedTuple):
    """What was decided before the first step."""

    steps: Any  # leaves [R, ...]: what each step reads (its router's weights, its number)
    tokens: Any  # leaves [B, T, ...]: what each token carries through the steps; narrowed along with the states
    stats: RouterStats | None = None  # when the decision was made at once; else the executors sum them step by step


class DepthPolicy(Protocol):
    """Arrays: z [B, T] float32 router scores (or [B, T, ...], handed back as they came); candidates, active [B, T] bool;
    k a token count per row.

    `step` is one slice of `Route.steps`, `tokens` is `Route.tokens`.
    """

    recursions: int

    def init(self, key: jax.Array) -> dict:
        """Router parameters; {} when there are none."""

    def logical_axes(self) -> dict:
        """Logical axis names of `init`'s leaves."""

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Static row sizes of steps r = 1..R for the gathered executor, smallest profile first; the last one holds
        whatever the policy can ask for. One profile when the sizes are known beforehand."""

    def begin(
        self, routers: dict, h_BxTxD: jax.Array, real_BxT: jax.Array, depth_BxT: jax.Array | None = None,
        draw_BxTxR: jax.Array | None = None,
    ) -> Route:  # fmt: skip
        """Look at the states before the first step. `depth_BxT`: depths decided earlier from the same states, for
        policies that decide at once. `draw_BxTxR`: numbers in [0, 1), for policies that draw."""

    def depths(self, routers: dict, h_BxTxD: jax.Array, dial_BxR: jax.Array | None = None) -> jax.Array | None:
        """Depth of every token from the states before the first step, for policies that decide at once; else None.
        `dial_BxR`: see `DepthControl`."""

    def regated(self, routers: dict, tokens: Any, dial_BxR: jax.Array, floor_B: jax.Array, cap_B: jax.Array) -> Any:
        """`Route.tokens` with the gates that belong to a `DepthControl`; called for policies that decide at once."""

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        """Scores z of one recursion step."""

    def select(
        self, step: Any, z_BxT: jax.Array, candidates_BxT: jax.Array, tokens: Any, k: Any, dial: Any = None
    ) -> jax.Array:
        """Mask of the candidates that run this step. `k`: at most this many a row, chosen over the whole row
        (training); None: by the causal rule, from each token's own score alone. `dial` [B, 1]: this step's column of
        a `DepthControl`'s dial, for policies that decide step by step."""

    def combine(self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: Any) -> jax.Array:
        """State after the step of tokens that ran it: h [B, K, D] before, y [B, K, D] the core's output."""

    def step_stats(self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: Any) -> RouterStats:
        """Sums of one step (scalars); not called when `Route.stats` is given."""

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        """Candidates of each step [R] in training, from the number of real tokens of each row alone."""

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        """Unweighted auxiliary losses of a micro-batch, by name, such that the sum over micro-batches is the batch's.
        `totals_R`: `candidate_counts` of the whole batch."""

    def loss_weights(self) -> dict[str, float]:
        """Weight of each of `losses`."""

    def rebalance(self, routers: dict, stats: RouterStats) -> dict:
        """Router parameters after an optimiser step: what is moved by rule and not by gradient."""

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        """[R]: a `DepthControl`'s dial for this mean depth, read off the survey (on the host).

        Raises UserError where there is nothing to dial, or not so far."""


def zeros_stats(recursions: int) -> RouterStats:
    """All sums zero, nothing surveyed."""
    return RouterStats(*(jnp.zeros((recursions,), jnp.float32),) * (len(RouterStats._fields) - 1))


def top_k(z_BxT: jax.Array, candidates_BxT: jax.Array, k: jax.Array | int) -> jax.Array:
    """Mask of the at most k highest-scoring candidates of each row; equal scores go to the earlier position.

    The k-th largest score by a plain sort: `lax.top_k` would gather the scores of a sharded batch, and k may be traced.
    Rows that are cut along time are put together for it: the choice is over the whole row.
    """
    z_BxT, candidates_BxT = whole(jax.lax.stop_gradient(z_BxT)), whole(candidates_BxT)
    score = jnp.where(candidates_BxT, z_BxT, -jnp.inf)
    kth = jax.lax.dynamic_slice_in_dim(jnp.sort(score, axis=-1), score.shape[-1] - k, 1, axis=-1)
    above, level = score > kth, score == kth
    room = k - jnp.sum(above, axis=-1, keepdims=True)
    return mine((above | (level & (jnp.cumsum(level, axis=-1) <= room))) & candidates_BxT)


GRID_BITS = 14  # a row's scores are told apart to this part of the largest


def settled(z_BxT: jax.Array, candidates_BxT: jax.Array) -> jax.Array:
    """Scores on a grid of 2^-14 of the row's largest, for ranking: what is equal but for rounding becomes equal.

    Equal tokens have equal states wherever they see the same keys (runs of one token, the start of a document, steps
    whose other tokens halted). Two programs that compute such scores in another order of sums (masked and gathered, one
    device and eight) get them some 1e-7 apart, each its own way, and would rank them at random; on the grid they tie,
    and the earlier position wins everywhere. Only a value that lies within a rounding error of the middle between two
    points can still fall either way: one in some hundreds of such ties. The grid is a power of two, hence the same in
    every program.
    """
    z_BxT = jax.lax.stop_gradient(z_BxT)
    largest = jnp.max(whole(jnp.where(candidates_BxT, jnp.abs(z_BxT), 0)), axis=-1, keepdims=True)
    step = jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1] - GRID_BITS)
    return jnp.round(z_BxT / step) * step


def in_range(mean_depth: float, floor: int, cap: int) -> None:
    """Raise UserError unless tokens of depths floor..cap can have this mean depth."""
    if not floor <= mean_depth <= cap:
        raise UserError(
            f"a mean depth of {mean_depth:g} is out of reach: it must be between {floor} and {cap} recursions."
        )


def shares_at(capacities: tuple[float, ...], mean_depth: float, floor: int, cap: int) -> np.ndarray:
    """[R]: share of all tokens that run each step so that their mean depth is this.

    Below the depth of training the deepest steps give way first; above it every step is raised to one common share.
    On this path a step narrows either as it did in training, or is the first to do otherwise and sees the candidates
    it saw in training, or lets all or none of them through: so a survey, which knows the candidates of training alone,
    says exactly where the thresholds lie (where a floor of 2 or more has changed the candidates, nearly).
    """
    share = np.asarray(capacities, np.float64)
    share = np.where(np.arange(len(share)) < floor, 1.0, share) * (np.arange(len(share)) < cap)
    surplus = share.sum() - mean_depth
    if surplus >= 0:
        for r in reversed(range(floor, cap)):
            taken = min(share[r], surplus)
            share[r] -= taken
            surplus -= taken
        return share
    low, high = share[cap - 1], 1.0  # the common share, by bisection: the mean depth grows with it
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if np.maximum(share[:cap], level).sum() < mean_depth else (low, level)
    share[:cap] = np.maximum(share[:cap], high)
    return share


def kept_of(share_R: np.ndarray) -> np.ndarray:
    """[R]: of the tokens that ran the step before, the part that runs this one."""
    before = np.concatenate([[1.0], share_R[:-1]])
    return np.divide(share_R, before, out=np.zeros_like(share_R), where=before > 0)
