"""Direct preference optimisation (DPO; Rafailov et al., arXiv 2305.18290, equation 7): of two
conversations the model comes to prefer the chosen one, held to the weights it began with.

A pair is two segments of one row, 2p - 1 and 2p; its tokens have positive loss weights w in the
chosen conversation and negative ones in the rejected (`data.chat`, `data.packing`). With l and l'
the log-likelihoods of a token under the model and the reference, its reward margin is

    r = beta * sum over the pair of w (l - l'),    loss = -log sigmoid(r), a mean over pairs.

The reference, like a teacher (`train.distill`), lies beside the state and outside of checkpoints,
and reads each micro-batch once, as training does (top-k selection): with the first weights every
margin is 0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mor_jax.analysis import accounting
from mor_jax.model.lm import CAUSAL, LM, ROW, STATES, TOPK
from mor_jax.model.loss import next_token_targets
from mor_jax.nn.parameters import Axes
from mor_jax.parallel.rows import over_rows
from mor_jax.train.objective import Batch, Divisors, LossInputs, Sums


class Reference(NamedTuple):
    """The weights that a run is held to; see `train.objective.Objective`."""

    lm: LM
    params: Any
    beta: float

    @property
    def taught_axes(self) -> Axes:
        return ROW

    def with_params(self, params: Any) -> Reference:
        return self._replace(params=params)

    def teach(self, batch: Batch, mode: str = TOPK) -> Batch:
        """The batch with the reference's nll of each target as "taught", [B, T] float32."""
        nll = _token_nll(self.lm, self.params, batch, mode)
        return batch | {"taught": jax.lax.stop_gradient(nll)}

    def tables(self) -> tuple[None, None]:
        return None, None

    def counted(self, weights_BxT: jax.Array) -> jax.Array:
        """Those of the chosen conversations."""
        return weights_BxT > 0

    def counts(self, weights_BxT: jax.Array, segment_ids_BxT: jax.Array) -> Divisors:
        """(pairs, targets of the chosen conversations)."""
        paired = (weights_BxT != 0).astype(jnp.float32)
        pairs = jnp.sum(_of_pairs(paired, segment_ids_BxT) > 0).astype(jnp.float32)
        chosen = jnp.sum(self.counted(weights_BxT), dtype=jnp.float32)
        return Divisors(jnp.maximum(pairs, 1.0), jnp.maximum(chosen, 1.0))

    def sums(self, lm: LM, params: Any, rows: LossInputs) -> Sums:
        """(loss, nll of the chosen conversations, figures) of the pairs.

        The loss of a pair is of sums over tokens, whose logits must not exist all at once. So the
        margins are taken as numbers first, and the gradient is that of a cross-entropy whose
        weights are the derivative of the loss with respect to each token's nll: beta sigmoid(-r)
        w."""
        assert rows.taught is not None, "of `teach`"
        still, beta = jax.lax.stop_gradient, self.beta
        seg_BxT, weights_BxT = rows.segment_ids_BxT, rows.weights_BxT
        nll_BxT = still(lm.token_nll(still(params), still(rows.h_BxTxD), rows.targets_BxT))
        chosen, rejected, counted = margins(nll_BxT, rows.taught, weights_BxT, seg_BxT)
        reward = beta * (chosen - rejected)
        slope_BxP = beta * jax.nn.sigmoid(-reward) * counted
        slope_BxT = jnp.take_along_axis(slope_BxP, _pair(seg_BxT), axis=-1) * weights_BxT
        surrogate = lm.cross_entropy(params, rows.h_BxTxD, rows.targets_BxT, still(slope_BxT))
        figures = _figures(beta * chosen, beta * rejected, counted)
        loss = surrogate - still(surrogate) + figures["loss"]
        nll = jnp.sum(nll_BxT * self.counted(weights_BxT))
        return Sums(loss, nll, {f"preference/{name}": x for name, x in figures.items()})

    def flops_per_token(self) -> float:
        """True FLOPs of its forward pass."""
        return accounting.true_flops_per_token(self.lm.model, self.lm.depth).total

    def evaluate(self, lm: LM, params: Any, batches: list[Batch]) -> dict[str, float]:
        """preference/loss, accuracy, margin, chosen and rejected of held-out pairs, means over
        them. Both models read as they generate (causal depths)."""
        total: dict[str, float] = {}
        for batch in batches:
            sums = jax.device_get(_eval_step(lm, params, *self, batch))
            total = {name: total.get(name, 0.0) + float(x) for name, x in sums.items()}
        pairs = max(total.pop("pairs"), 1.0)
        return {f"preference/{name}": x / pairs for name, x in total.items()}


def margins(
    nll_BxT: jax.Array, reference_BxT: jax.Array, weights_BxT: jax.Array, seg_BxT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-ratio of the chosen, of the rejected, 1 where there is a pair), [B, P] each, P more than
    a row can hold."""
    ratio_BxT = jnp.abs(weights_BxT) * (reference_BxT - nll_BxT)
    chosen, rejected = (
        _of_pairs(jnp.where(side, ratio_BxT, 0.0), seg_BxT)
        for side in (weights_BxT > 0, weights_BxT < 0)
    )
    counted = _of_pairs((weights_BxT != 0).astype(jnp.float32), seg_BxT) > 0
    return chosen, rejected, counted.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _eval_step(
    lm: LM, params: Any, held_lm: LM, held_params: Any, beta: float, batch: Batch
) -> dict[str, jax.Array]:
    held = Reference(held_lm, held_params, beta)
    seg = batch["segment_ids"]
    _, weights = next_token_targets(batch["tokens"], seg, batch["weights"])
    nll, taught = _token_nll(lm, params, batch, CAUSAL), held.teach(batch, CAUSAL)["taught"]
    chosen, rejected, counted = margins(nll, taught, weights, seg)
    figures = _figures(held.beta * chosen, held.beta * rejected, counted)
    return figures | {"pairs": jnp.sum(counted)}


def _figures(chosen: jax.Array, rejected: jax.Array, counted: jax.Array) -> dict[str, jax.Array]:
    """Sums over pairs, of rewards [B, P]."""
    margin = chosen - rejected
    return {
        "loss": jnp.sum(jax.nn.softplus(-margin) * counted),
        "accuracy": jnp.sum((margin > 0) * counted),
        "margin": jnp.sum(margin * counted),
        "chosen": jnp.sum(chosen * counted),
        "rejected": jnp.sum(rejected * counted),
    }


def _token_nll(lm: LM, params: Any, batch: Batch, mode: str) -> jax.Array:
    tokens, seg = batch["tokens"], batch["segment_ids"]
    salt = batch.get("salt") if mode == TOPK else None
    h = lm.forward(params, tokens, seg, mode=mode, salt_B=salt).h_BxTxD
    targets, _ = next_token_targets(tokens, seg)

    def run(params: Any, h: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return lm.token_nll(params, h, targets), ()

    axes = (lm.logical_axes(), STATES, ROW)
    return over_rows(lm.rules, run, axes, ROW)(params, h, targets)[0]


def _pair(seg_BxT: jax.Array) -> jax.Array:
    """Number of the pair of each token, from 1; 0: padding."""
    return (seg_BxT + 1) // 2


def _of_pairs(x_BxT: jax.Array, seg_BxT: jax.Array) -> jax.Array:
    """Sums over the tokens of each pair, [B, P]; 0 for padding."""
    room = seg_BxT.shape[1] // 2 + 1  # a pair has two tokens at least
    sums_BxP = jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, room))(x_BxT, _pair(seg_BxT))
    return sums_BxP.at[:, 0].set(0.0)
