"""What a depth policy is: the small object that decides, token by token, who runs each recursion
step.

A policy is one file of this package with two frozen dataclasses. Its configuration, a
`PolicyConfig`, says its name, its fields and what they must satisfy. The policy itself, a
`DepthPolicy` that `PolicyConfig.build` makes, is called by the executors in `model/recurse.py`; it
never sees the blocks. `begin` looks at the states and the places of the tokens before the first
step and returns a `Route`; every step then reads its own slice of `Route.steps` and the tokens'
slice of `Route.tokens`.

`DepthPolicy` is a policy with the least in it, and every method may be left as it is: all tokens
run all steps, nothing is learned, nothing gated. Most policies replace `profiles` (how many tokens
a step holds), `select` (which), `combine` (how the core's output enters the state) and, if there is
something to learn, `init`, `score` and `losses`. One that knows each token's depth before the first
step derives from `AtOnce` and says the `depths`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.errors import UserError
from mor_jax.model.depth.histogram import histogram
from mor_jax.model.depth.survey import SURVEY
from mor_jax.nn.parameters import Tree
from mor_jax.parallel.rows import join_rows, own_part


class TokenInfo(NamedTuple):
    """What a policy may know of the tokens beside their states."""

    real_BxT: jax.Array  # bool; the others are padding
    pos_BxT: jax.Array  # int32, from 0 at the start of the token's document
    ids_BxT: jax.Array | None = None  # int32, in the vocabulary
    # uint32, another one for each row of each training step; None: inference
    salt_B: jax.Array | None = None
    # depths decided earlier from the same states, by a policy that decides at once
    depth_BxT: jax.Array | None = None


class RouterStats(NamedTuple):
    """Sums over the real tokens of a batch, one entry a recursion step: leaves [R] (or as said),
    float32."""

    aux: jax.Array  # auxiliary loss over candidates
    candidates: jax.Array  # tokens that could run the step
    selected: jax.Array  # tokens that ran it
    agree: jax.Array  # candidates for which the causal rule and the selection agree
    score: jax.Array  # sum of the score, before alpha, over candidates
    score_sq: jax.Array  # and of its square
    # sum of logsumexp(z)^2 over candidates (of the one router's logits, at the first step only)
    z_sq: jax.Array
    # tokens that ran it and that the rival of the router (expert-choice: the auxiliary) would take
    overlap: jax.Array
    # [R, G]: candidates whose score reaches each probe (`survey.PROBES_G`)
    above: jax.Array | None = None


class Route(NamedTuple):
    """What was decided before the first step."""

    steps: Any  # leaves [R, ...]: what each step reads (its router's weights, its number)
    # leaves [B, T, ...]: what each token carries through the steps; narrowed along with the states
    tokens: Any
    # when the decision was made at once; else the executors sum them step by step
    stats: RouterStats | None = None


class Counts(NamedTuple):
    """What the accounting of parameters, FLOPs and memory asks of a policy."""

    learned: int  # parameters of the router
    surveyed: int  # values beside them that are no parameters: the survey of its scores
    flops: float  # of the router, forward, over one row
    # tokens of a row that each step of the gathered executor holds at most
    row_sizes: tuple[int, ...]


class DepthPolicy:
    """The default policy, and the interface of all. Arrays: z [B, T] float32 router scores (or [B,
    T, ...], handed back as they came); candidates, active [B, T] bool; k a token count per row.

    `step` is one slice of `Route.steps`, `tokens` is `Route.tokens`, `info` says what is known of
    the tokens.
    """

    recursions: int

    dials: ClassVar[bool] = False  # its mean depth can be dialled
    draws: ClassVar[bool] = False  # it draws numbers: a training step gives each row a salt
    reenters: ClassVar[bool] = False  # a token that one step left out may run the next
    halts: ClassVar[bool] = False  # it stops tokens by `judge`: it has the masked executor alone

    # ---------------------------------------------------------------- parameters

    def init(self, key: jax.Array) -> Tree:
        """Router parameters; {} when there are none."""
        return {}

    def logical_axes(self) -> Tree:
        """Logical axis names of `init`'s leaves."""
        return {}

    def rebalance(self, routers: Tree, stats: RouterStats) -> Tree:
        """Router parameters after an optimiser step: what is moved by rule and not by gradient."""
        return routers

    # ---------------------------------------------------------------- who runs a step, and what it
    # does to the state

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        """Static row sizes of steps r = 1..R for the gathered executor, smallest profile first; the
        last one holds whatever the policy can ask for. One profile when the sizes are known
        beforehand."""
        return ((length,) * self.recursions,)

    def steps(self, routers: Tree) -> Any:
        """What each step reads, leaves [R, ...]."""
        return jnp.arange(self.recursions)

    def derived(self, routers: Tree) -> Tree:
        """What follows from the parameters and an export holds beside them."""
        return {}

    def begin(self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo) -> Route:
        """Look at the states before the first step."""
        return Route(self.steps(routers), ())

    def depths(
        self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo, dial_BxR: jax.Array | None = None
    ) -> jax.Array | None:
        """Depth of every token from the states before the first step, for policies that decide at
        once; else None.
        `dial_BxR`: see `DepthControl`."""
        return None

    def recompute_gates(
        self, routers: Tree, tokens: Any, dial_BxR: jax.Array, floor_B: jax.Array, cap_B: jax.Array
    ) -> Any:
        """`Route.tokens` with the gates that belong to a `DepthControl`; called for policies that
        decide at once."""
        return tokens

    def score(self, step: Any, h_BxTxD: jax.Array) -> jax.Array:
        """Scores z of one recursion step."""
        return jnp.zeros(h_BxTxD.shape[:2], jnp.float32)

    def select(
        self,
        step: Any,
        z_BxT: jax.Array,
        candidates_BxT: jax.Array,
        tokens: Any,
        k: Any,
        dial: Any = None,
    ) -> jax.Array:
        """Mask of the candidates that run this step. `k`: at most this many a row, chosen over the
        whole row (training); None: by the causal rule, from each token's own score alone. `dial`
        [B, 1]: this step's column of a `DepthControl`'s dial, for policies that decide step by
        step."""
        return candidates_BxT

    def combine(
        self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: Any
    ) -> jax.Array:
        """State after the step of tokens that ran it: h [B, K, D] before, y [B, K, D] the core's
        output."""
        return y

    def remember(self, h_BxTxD: jax.Array) -> Any:
        """What is kept of each token for `judge`, before the first step; leaves [B, T, ...]."""
        return ()

    def judge(
        self, step: Any, memory: Any, before: jax.Array, after: jax.Array
    ) -> tuple[jax.Array | None, Any]:
        """(which tokens may go on after a step, from their states before and after it; memory).
        None: all of them."""
        return None, memory

    def finish(self, memory: Any, h_BxTxD: jax.Array) -> jax.Array:
        """What leaves the recursion, from what is remembered and the states after the last step."""
        return h_BxTxD

    def finish_stats(self, memory: Any, real_BxT: jax.Array, stats: RouterStats) -> RouterStats:
        """The sums of all steps, with what is known only after the last."""
        return stats

    # ---------------------------------------------------------------- what training reads

    def step_stats(
        self, step: Any, z: jax.Array, candidates: jax.Array, active: jax.Array, tokens: Any
    ) -> RouterStats:
        """Sums of one step (scalars); not called when `Route.stats` is given."""
        zero, weight = jnp.zeros((), jnp.float32), candidates.astype(jnp.float32)
        ran = jnp.sum(active.astype(jnp.float32))
        agree = jnp.sum((self.select(step, z, candidates, tokens, None) == active) * weight)
        return RouterStats(zero, jnp.sum(weight), ran, agree, zero, zero, zero, ran)

    def candidate_counts(self, real_B: jax.Array, length: int) -> jax.Array:
        """Candidates of each step [R] in training, from the number of real tokens of each row
        alone."""
        return jnp.full((self.recursions,), jnp.sum(real_B), jnp.float32)

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        """Unweighted auxiliary losses of a micro-batch, by name, such that the sum over
        micro-batches is the batch's.
        `totals_R`: `candidate_counts` of the whole batch."""
        return {}

    def loss_weights(self) -> dict[str, float]:
        """Weight of each of `losses`."""
        return {}

    def metrics(self, stats: RouterStats) -> dict[str, jax.Array]:
        """Readable numbers of a training step from its sums, by name; a routed policy's start with
        `router_metrics`."""
        return router_metrics(stats)

    # ---------------------------------------------------------------- accounting, and the dial (on
    # the host)

    def shares(self) -> tuple[float, ...]:
        """Share of tokens that run step r = 1..R in training."""
        return (1.0,) * self.recursions

    def expected_shares(self, routers: Tree) -> tuple[float, ...]:
        """Share of tokens expected to run step r = 1..R under the causal rule of this router,
        trained or not."""
        return self.shares()

    def router_flops(self, length: int, ran_R: Sequence[float]) -> float:
        """FLOPs of the router, forward, over a row of `length` tokens of which so many run each
        step."""
        return 0.0

    def counts(self, length: int, ran_R: Sequence[float] | None = None) -> Counts:
        """`Counts` of rows of `length` tokens, `ran_R` of which run each step (default: those of
        `shares`)."""
        ran_R = [share * length for share in self.shares()] if ran_R is None else ran_R
        return Counts(
            *_parameter_counts(self), self.router_flops(length, ran_R), self.profiles(length)[-1]
        )

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        """[R]: a `DepthControl`'s dial for this mean depth, read off the survey.

        Raises UserError where there is nothing to dial, or not so far."""
        raise UserError(
            "the depth policy of this model sets the depth of every token, so there is no mean depth to dial; a minimum "
            "and a maximum depth can be set."
        )

    def candidates_kept(self) -> np.ndarray | None:
        """[R]: the part of each step's candidates that runs it in training; None where the scores
        of all steps exist before the first, so that one pass surveys them
        (`inference.dial.calibrate`)."""
        return None


@functools.lru_cache(maxsize=256)
def _parameter_counts(policy: DepthPolicy) -> tuple[int, int]:
    """(parameters, values of the survey) of the tree that `init` makes; nothing is computed."""
    tree = jax.eval_shape(lambda: policy.init(jax.random.key(0)))

    def size(tree: Tree) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    learned = size({name: leaf for name, leaf in tree.items() if name != SURVEY})
    return learned, size(tree) - learned


class DepthRoute(NamedTuple):
    """What a token carries whose depth is known."""

    depth_BxT: jax.Array  # 0: padding


class AtOnce(DepthPolicy):
    """A policy that knows each token's depth before the first step: a token of depth i runs steps
    1..i."""

    def steps(self, routers: Tree) -> Any:
        return jnp.arange(1, self.recursions + 1)

    def begin(self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo) -> Route:
        depth_BxT = (
            self.depths(routers, h_BxTxD, info) if info.depth_BxT is None else info.depth_BxT
        )
        assert depth_BxT is not None, "a policy of this kind says it"
        return Route(self.steps(routers), DepthRoute(jnp.where(info.real_BxT, depth_BxT, 0)))

    def select(
        self,
        step: Any,
        z_BxT: jax.Array,
        candidates_BxT: jax.Array,
        tokens: Any,
        k: Any,
        dial: Any = None,
    ) -> jax.Array:
        return candidates_BxT & (tokens.depth_BxT >= step)


class PolicyConfig(DepthConfig):
    """The configuration of a policy; see `config.depth.DepthConfig` for what it can say of
    itself."""

    def build(self, model: ModelConfig, stage: int | None = None) -> DepthPolicy:
        """The policy of this checked configuration, in this stage of training (`LM.stage`)."""
        raise NotImplementedError


def router_metrics(stats: RouterStats) -> dict[str, jax.Array]:
    """Per-step numbers from sums; keys `router/<r>/...`, r from 1. `histogram` is a list of shares,
    the others are single numbers."""
    n = jnp.maximum(stats.candidates, 1.0)
    mean = stats.score / n
    columns = {
        "sampling_accuracy": stats.agree / n,
        "selected": stats.selected / n[0],
        "score_mean": mean,
        "score_std": jnp.sqrt(jnp.maximum(stats.score_sq / n - jnp.square(mean), 0.0)),
    }
    if stats.above is not None:
        columns["histogram"] = histogram(stats.above)
    return {
        f"router/{r + 1}/{name}": col[r] for name, col in columns.items() for r in range(n.shape[0])
    }


def top_k(z_BxT: jax.Array, candidates_BxT: jax.Array, k: jax.Array | int) -> jax.Array:
    """Mask of the at most k highest-scoring candidates of each row; equal scores go to the earlier
    position.

    The k-th largest score by a plain sort: `lax.top_k` would gather the scores of a sharded batch,
    and k may be traced. Rows that are cut along time are put together for it: the choice is over
    the whole row.
    """
    z_BxT, candidates_BxT = join_rows(jax.lax.stop_gradient(z_BxT)), join_rows(candidates_BxT)
    score = jnp.where(candidates_BxT, z_BxT, -jnp.inf)
    kth = jax.lax.dynamic_slice_in_dim(jnp.sort(score, axis=-1), score.shape[-1] - k, 1, axis=-1)
    above, level = score > kth, score == kth
    room = k - jnp.sum(above, axis=-1, keepdims=True)
    return own_part((above | (level & (jnp.cumsum(level, axis=-1) <= room))) & candidates_BxT)


GRID_BITS = 14  # a row's scores are told apart to this part of the largest


def rounded_scores(z_BxT: jax.Array, candidates_BxT: jax.Array) -> jax.Array:
    """Scores rounded to a grid of 2^-14 of the row's largest, for ranking: what is equal but for
    rounding becomes equal.

    Equal tokens have equal states wherever they see the same keys (runs of one token, the start of
    a document, steps whose other tokens halted). Two programs that compute such scores in another
    order of sums (masked and gathered, one device and eight) get them some 1e-7 apart, each its own
    way, and would rank them at random; on the grid they tie, and the earlier position wins
    everywhere. Only a value that lies within a rounding error of the middle between two points can
    still fall either way: one in some hundreds of such ties. The grid is a power of two, hence the
    same in every program.
    """
    z_BxT = jax.lax.stop_gradient(z_BxT)
    largest = jnp.max(
        join_rows(jnp.where(candidates_BxT, jnp.abs(z_BxT), 0)), axis=-1, keepdims=True
    )
    step = jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1] - GRID_BITS)
    return jnp.round(z_BxT / step) * step


def check_reachable(mean_depth: float, floor: int, cap: int) -> None:
    """Raise UserError unless tokens of depths floor..cap can have this mean depth."""
    if not floor <= mean_depth <= cap:
        raise UserError(
            f"a mean depth of {mean_depth:g} is out of reach: it must be between {floor} and {cap} recursions."
        )


def shares_at(capacities: tuple[float, ...], mean_depth: float, floor: int, cap: int) -> np.ndarray:
    """[R]: share of all tokens that run each step so that their mean depth is this.

    Below the depth of training the deepest steps give way first; above it every step is raised to
    one common share. On this path a step narrows either as it did in training, or is the first to
    do otherwise and sees the candidates it saw in training, or lets all or none of them through: so
    a survey, which knows the candidates of training alone, says exactly where the thresholds lie
    (where a floor of 2 or more has changed the candidates, nearly).
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
        low, high = (
            (level, high) if np.maximum(share[:cap], level).sum() < mean_depth else (low, level)
        )
    share[:cap] = np.maximum(share[:cap], high)
    return share


def kept_of(share_R: np.ndarray) -> np.ndarray:
    """[R]: of the tokens that ran the step before, the part that runs this one."""
    before = np.concatenate([[1.0], share_R[:-1]])
    return np.divide(share_R, before, out=np.zeros_like(share_R), where=before > 0)
