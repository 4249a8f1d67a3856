"""Token-choice routing: each token picks its depth once, before the first recursion (paper 2.2.1,
A.2).

One R-way router on H¹, the state before the recursion: p = alpha * softmax(z) (or alpha *
sigmoid(z)), depth i = argmax_j (p_j + b_j). The token runs steps 1..i. Nothing looks at another
token, so the policy is causal as it is.

Two readings of the gate exist and both are here by name. "exit" is the released code: H^{r+1} =
f(H^r) without a gate, and H_out = H¹ + p_i f(H^i) at the exit. "every" is the paper's eq. 2.2:
every step is gated,
H^{r+1} = p_i f(H^r), and H¹ is added at the exit step.

Balance: a loss R * sum_i F_i P_i (F_i share routed to depth i, P_i mean of alpha * score, as in the
released code; alpha when balanced under a softmax), or loss-free: after
each optimiser step b_i += rate * sign(mean(F) - F_i), which moves the choice but never the gate.

At inference a bias on the logarithm of the scores, growing evenly with depth, is the mean-depth
dial. The gate follows it: a token that the dial sends to another depth would otherwise be gated by
the score that its router gave that depth, which is next to nothing once the router has decided, and
would come back as it went in. A floor and a cap act alike on a softmax: what is out of range has no
part in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax import nn
from mor_jax.config import ModelConfig
from mor_jax.config.refusals import not_negative
from mor_jax.errors import ConfigError, UserError
from mor_jax.model.depth import survey
from mor_jax.model.depth.base import AtOnce, Route, RouterStats, TokenInfo, check_reachable
from mor_jax.model.depth.fields import Routed, balanced
from mor_jax.model.depth.survey import SURVEY
from mor_jax.model.depth.vary import mean_depth
from mor_jax.model.depth.warmup import is_warm, stage_count
from mor_jax.nn.parameters import Tree

SMALLEST = 1e-30  # selection score under a bias, which can take it below zero
# of the smallest profile over balanced shares: rows of a balanced router scatter around them
SLACK = 0.06


class TokenRoute(NamedTuple):
    """What a token carries: its depth (0: padding), its gate, and its state before the
    recursion."""

    depth_BxT: jax.Array
    gate_BxT: jax.Array
    h_BxTxD: jax.Array


@dataclass(frozen=True)
class TokenChoiceConfig(Routed):
    """Each token picks its depth once, before the first recursion."""

    policy: str = "token_choice"
    balance_loss_weight: float = 0.1  # of R * sum_i F_i P_i
    # loss-free balancing: step of the selection bias after each optimiser step; 0: off
    bias_rate: float = 0.0
    # gathered: sizes a step may take at run time; the last holds every token, so none is dropped
    buckets: int = 4

    at_once: ClassVar[bool] = True
    staged: ClassVar[bool] = True
    scores: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid")
    gates: ClassVar[tuple[str, ...]] = ("exit", "every")
    exported: ClassVar[bool] = True
    does: ClassVar[str] = "lets each token choose, and decides in training as at inference"

    def check(self, model: ModelConfig) -> None:
        not_negative(
            "config.depth", balance_loss_weight=self.balance_loss_weight, bias_rate=self.bias_rate
        )
        if self.buckets < 1:
            raise ConfigError(f"config.depth.buckets must be at least 1, got {self.buckets}.")
        super().check(model)

    def shares(self, model: ModelConfig) -> tuple[float, ...]:
        return balanced(model.recursions)

    def build(self, model: ModelConfig, stage: int | None = None) -> TokenChoice:
        varied = stage - stage_count(self) if stage is not None and is_warm(self, stage) else None
        return TokenChoice(
            recursions=model.recursions,
            width=model.width,
            alpha=self.gate_scale,
            init_std=model.init_std,
            score_name=self.score_name,
            gate=self.gate_name,
            router=self.router,
            temperature=self.temperature,
            balance_loss_weight=self.balance_loss_weight,
            z_loss_weight=self.z_loss_weight,
            bias_rate=self.bias_rate,
            buckets=self.buckets,
            tile=self.tile,
            all_deep=not is_warm(self, stage),
            mean_depth=0.0 if varied is None else mean_depth(model, self, varied),
        )


@dataclass(frozen=True)
class TokenChoice(AtOnce):
    """`score`: softmax | sigmoid. `gate`: exit | every."""

    recursions: int
    width: int
    alpha: float
    init_std: float
    score_name: str = "softmax"
    gate: str = "exit"
    router: str = "linear"
    temperature: float = 1.0
    balance_loss_weight: float = 0.1
    z_loss_weight: float = 0.0
    bias_rate: float = 0.0
    buckets: int = 4
    tile: int = 1  # row sizes are multiples of it
    all_deep: bool = False  # warm-up: every token at full depth, balance suspended
    # varied: trained under the dial at this mean depth, balance and survey suspended; 0: not
    mean_depth: float = 0.0

    dials: ClassVar[bool] = True

    def _module(self) -> nn.Router:
        return nn.Router(self.router, self.recursions, self.init_std)

    def _example(self) -> np.ndarray:
        return np.zeros((1, 1, self.width), np.float32)

    def init(self, key: jax.Array) -> Tree:
        # Weights like any other to checkpoints and shardings, but all of them except `choice` are
        # moved by `rebalance`, never by a gradient.
        params = {
            "choice": nn.init(self._module(), key, self._example()),
            SURVEY: survey.empty(self.recursions),
        }
        return params | (
            {"bias": jnp.zeros((self.recursions,), jnp.float32)} if self.bias_rate else {}
        )

    def logical_axes(self) -> Tree:
        axes = {
            "choice": nn.logical_axes(self._module(), self._example()),
            SURVEY: ("recursion", None),
        }
        return axes | ({"bias": ("recursion",)} if self.bias_rate else {})

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        """From balanced shares with a little slack up to whole rows, in `buckets` strides that
        grow: rows of a trained router scatter about twice as wide as independent draws would, so
        most batches need little over the smallest."""
        steps = self.recursions
        if self.all_deep:
            return ((length,) * steps,)
        found = []
        for j in range(self.buckets):
            t = (j / (self.buckets - 1)) ** 2 if self.buckets > 1 else 1.0
            shares = [min(1.0, (steps - r) / steps * (1 + SLACK)) for r in range(steps)]
            sizes = tuple(
                min(length, -(-math.ceil((s + (1 - s) * t) * length) // self.tile) * self.tile)
                for s in shares
            )
            if sizes not in found:
                found.append(sizes)
        return tuple(found)

    def begin(self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo) -> Route:
        z_BxTxR, score = self._scores(routers, h_BxTxD)
        dial_BxR = self._trained_dial(routers, len(h_BxTxD)) if self.mean_depth else None
        real_BxT, depth_BxT = info.real_BxT, info.depth_BxT
        if depth_BxT is None:
            depth_BxT = self.depths(routers, h_BxTxD, info, dial_BxR)
            if self.all_deep:
                depth_BxT = jnp.full_like(depth_BxT, self.recursions)
        depth_BxT = jnp.where(real_BxT, depth_BxT, 0)
        chosen = jnp.maximum(depth_BxT - 1, 0)[..., None]
        gate = self.alpha * jnp.take_along_axis(score, chosen, axis=-1)[..., 0]
        stats = self._stats(
            z_BxTxR, score, self._log_selection(routers, z_BxTxR, score), depth_BxT, real_BxT
        )
        tokens = TokenRoute(depth_BxT, gate, h_BxTxD)
        if dial_BxR is not None:
            rows = jnp.zeros((len(h_BxTxD),), jnp.int32)
            tokens = self.recompute_gates(routers, tokens, dial_BxR, rows, rows + self.recursions)
        return Route(self.steps(routers), tokens, stats)

    def _trained_dial(self, routers: Tree, rows: int) -> jax.Array:
        """[B, R]: `dial` within the step, from the survey so far; nothing is dialled before there
        is one."""
        survey_RxG = jax.lax.stop_gradient(routers[SURVEY])
        beyond_G = jnp.sum(survey_RxG[1:, 1:] / jnp.maximum(survey_RxG[1:, :1], 1e-9), axis=0)
        pull = jnp.interp(self.mean_depth - 1, beyond_G[::-1], jnp.asarray(survey.PROBES_G[:0:-1]))
        tilt = jnp.where(survey_RxG[0, 0] > 0, -pull, 0.0)
        return jnp.broadcast_to(tilt * jnp.arange(self.recursions), (rows, self.recursions))

    def depths(
        self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo, dial_BxR: jax.Array | None = None
    ) -> jax.Array:
        z_BxTxR, score = self._scores(routers, h_BxTxD)
        depth_BxT = self._choice(routers, score)
        if dial_BxR is None:
            return depth_BxT
        dialled = (
            jnp.argmax(self._log_selection(routers, z_BxTxR, score) + dial_BxR[:, None], axis=-1)
            + 1
        )
        return jnp.where(jnp.isnan(dial_BxR[:, :1]), depth_BxT, dialled.astype(jnp.int32))

    def recompute_gates(
        self,
        routers: Tree,
        tokens: TokenRoute,
        dial_BxR: jax.Array,
        floor_B: jax.Array,
        cap_B: jax.Array,
    ) -> TokenRoute:
        if self.score_name != "softmax":  # a sigmoid's scores do not share one whole
            return tokens
        z_BxTxR, _ = self._scores(routers, tokens.h_BxTxD)
        depth_R = jnp.arange(1, self.recursions + 1)
        allowed_BxR = (depth_R >= floor_B[:, None]) & (depth_R <= cap_B[:, None])
        tilted = z_BxTxR + jnp.where(jnp.isnan(dial_BxR), 0.0, dial_BxR)[:, None]
        score = jax.nn.softmax(jnp.where(allowed_BxR[:, None], tilted, -jnp.inf))
        chosen = jnp.maximum(tokens.depth_BxT - 1, 0)[..., None]
        return tokens._replace(
            gate_BxT=self.alpha * jnp.take_along_axis(score, chosen, axis=-1)[..., 0]
        )

    def _scores(self, routers: Tree, h_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits and scores before alpha, [B, T, R]."""
        z_BxTxR = nn.apply(self._module(), routers["choice"], h_BxTxD / self.temperature)
        return z_BxTxR, jax.nn.softmax(z_BxTxR) if self.score_name == "softmax" else jax.nn.sigmoid(
            z_BxTxR
        )

    def _bias(self, routers: Tree) -> jax.Array | float:
        return routers["bias"] if self.bias_rate else 0.0

    def _choice(self, routers: Tree, score_BxTxR: jax.Array) -> jax.Array:
        return (
            jnp.argmax(self.alpha * score_BxTxR + self._bias(routers), axis=-1).astype(jnp.int32)
            + 1
        )

    def _log_selection(
        self, routers: Tree, z_BxTxR: jax.Array, score_BxTxR: jax.Array
    ) -> jax.Array:
        """Logarithm of the selection scores over alpha, in which the dial is turned: the same
        order, but scores of a decided router, all near 0 or 1, stay apart, so that tokens change
        their depth one by one. Taken of the logits where it can be: the scores themselves
        underflow."""
        if not self.bias_rate:
            return (jax.nn.log_softmax if self.score_name == "softmax" else jax.nn.log_sigmoid)(
                z_BxTxR
            )
        return jnp.log(jnp.maximum(score_BxTxR + self._bias(routers) / self.alpha, SMALLEST))

    def _stats(
        self,
        z_BxTxR: jax.Array,
        score_BxTxR: jax.Array,
        log_selection_BxTxR: jax.Array,
        depth_BxT: jax.Array,
        real_BxT: jax.Array,
    ) -> RouterStats:
        weight = real_BxT[..., None].astype(jnp.float32)
        ran = (depth_BxT[..., None] > jnp.arange(self.recursions)).astype(jnp.float32)

        def total(x: jax.Array) -> jax.Array:
            return jnp.sum(x, axis=(0, 1))

        tokens_R = jnp.full((self.recursions,), jnp.sum(weight), jnp.float32)
        lse_sq = jnp.square(jax.nn.logsumexp(z_BxTxR, axis=-1, keepdims=True)) * weight
        return RouterStats(
            aux=jnp.zeros((self.recursions,), jnp.float32),
            candidates=tokens_R,
            selected=total(ran * weight),
            agree=tokens_R,  # one rule, in training and in decoding
            score=total(score_BxTxR * weight),
            score_sq=total(jnp.square(score_BxTxR) * weight),
            z_sq=jnp.zeros((self.recursions,), jnp.float32).at[0].set(total(lse_sq)[0]),
            overlap=total(ran * weight),
            above=jnp.stack(
                [survey.count_above(s, real_BxT) for s in pull_deeper(log_selection_BxTxR)]
            ),
        )

    def combine(
        self, step: Any, h: jax.Array, y: jax.Array, z: jax.Array, tokens: TokenRoute
    ) -> jax.Array:
        last = (tokens.depth_BxT == step)[..., None]
        gated = tokens.gate_BxT[..., None].astype(h.dtype) * y
        if self.gate == "every":
            return gated + jnp.where(last, tokens.h_BxTxD, 0)
        return jnp.where(last, tokens.h_BxTxD + gated, y)

    def metrics(self, stats: RouterStats) -> dict[str, jax.Array]:
        """Beside those of every router how evenly the depths are used: MaxVio = max load / mean
        load - 1, entropy of the mean scores in nats (at most ln R), and each depth's load (paper,
        table 14)."""
        load, mean = load_shares(stats), stats.score / jnp.maximum(stats.candidates, 1.0)
        p = mean / jnp.maximum(jnp.sum(mean), 1e-9)
        return super().metrics(stats) | {
            "router/max_vio": jnp.max(load) * load.shape[0] - 1.0,
            "router/entropy": -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-9))),
            **{f"router/{r + 1}/load": load[r] for r in range(load.shape[0])},
        }

    def shares(self) -> tuple[float, ...]:
        return balanced(self.recursions)

    def expected_shares(self, routers: Tree) -> tuple[float, ...]:
        try:
            reach = survey.reach(np.asarray(routers.get(SURVEY, ())))
        except UserError:
            return self.shares()
        # every row is of all tokens
        return tuple(np.minimum.accumulate(survey.share_above(reach, 0.0)).tolist())

    def router_flops(self, length: int, ran_R: Sequence[float]) -> float:
        """One router, which reads every token."""
        return 2 * nn.router_size(self.router, self.width, self.recursions) * length

    def losses(self, stats: RouterStats, totals_R: jax.Array) -> dict[str, jax.Array]:
        """Balance loss R * sum_i F_i P_i and z-loss, each a mean over tokens.

        F and P are the micro-batch's own, weighted by its share of the batch's tokens: under
        accumulation the term is the mean over micro-batches (equal to the whole batch's only where
        all route alike)."""
        tokens = jnp.maximum(stats.candidates, 1.0)
        mean_R = self.alpha * stats.score / tokens  # P, with alpha as in the gate
        balance = self.recursions * jnp.sum(load_shares(stats) * mean_R)
        return {
            "router_loss": balance * stats.candidates[0] / totals_R[0],
            "router_z_loss": jnp.sum(stats.z_sq / totals_R),
        }

    def loss_weights(self) -> dict[str, float]:
        return {
            "router_loss": 0.0 if self.all_deep or self.mean_depth else self.balance_loss_weight,
            "router_z_loss": self.z_loss_weight,
        }

    def rebalance(self, routers: Tree, stats: RouterStats) -> Tree:
        if self.mean_depth:
            return routers
        routers = survey.continued(routers, stats.above)
        if not self.bias_rate or self.all_deep:
            return routers
        load = load_shares(stats)
        return routers | {
            "bias": routers["bias"] + self.bias_rate * jnp.sign(jnp.mean(load) - load)
        }

    def dial(self, survey_RxG: np.ndarray, mean_depth: float, floor: int, cap: int) -> np.ndarray:
        """One number a for all tokens, a * (i - 1) added to the log selection score of depth i. A
        token of pull u_r (`pull_deeper`) runs step r where u_r >= -a, so the mean depth is 1 plus
        the shares that reach -a, summed over the steps between floor and cap."""
        floor = max(floor, 1)
        check_reachable(mean_depth, floor, cap)
        beyond = survey.reach(survey_RxG)[floor:cap].sum(axis=0)
        pull = (
            np.interp(mean_depth - floor, beyond[::-1], survey.PROBES_G[:0:-1])
            if cap > floor
            else 0.0
        )
        return np.asarray(-pull * np.arange(self.recursions), np.float32)


def pull_deeper(log_selection_BxTxR: jax.Array) -> list[jax.Array]:
    """u_r [B, T] of each step r: the token's depth reaches r exactly when a * i, added to the score
    of every depth i, has a >= -u_r. Depth i >= r must beat every k < r: s_i + a i >= s_k + a k."""
    s = jax.lax.stop_gradient(log_selection_BxTxR)
    steps = s.shape[-1]
    pulls = [jnp.full(s.shape[:-1], jnp.inf)]  # every token runs the first step
    for r in range(1, steps):
        beats = [
            functools.reduce(jnp.minimum, [(s[..., i] - s[..., k]) / (i - k) for k in range(r)])
            for i in range(r, steps)
        ]
        pulls.append(functools.reduce(jnp.maximum, beats))
    return pulls


def load_shares(stats: RouterStats) -> jax.Array:
    """F [R]: share of tokens whose depth is exactly r."""
    ran = jnp.concatenate([stats.selected, jnp.zeros((1,), jnp.float32)])
    return jax.lax.stop_gradient((ran[:-1] - ran[1:]) / jnp.maximum(stats.candidates, 1.0))
