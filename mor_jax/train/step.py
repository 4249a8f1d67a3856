"""One optimiser step as a pure function of (state, batch)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey

from mor_jax.model.adapter import Adapters
from mor_jax.model.depth import RouterStats
from mor_jax.model.depth.survey import SURVEY
from mor_jax.model.depth.warmup import is_warm, stage_of
from mor_jax.model.lm import LM, ROW, STATES, TOPK
from mor_jax.model.loss import next_token_targets
from mor_jax.model.recursion.sampling import draw
from mor_jax.nn.parameters import Axes, Tree
from mor_jax.parallel.rows import over_rows
from mor_jax.train.loops import loop_loss
from mor_jax.train.objective import NEXT_TOKEN, Batch, LossInputs, Objective, Scales, Sums
from mor_jax.train.state import TrainState

# a train step: (state, batch, limit, beside) -> (state, metrics)
Program = Callable[..., tuple[TrainState, dict[str, jax.Array]]]

# metrics of every run, 0 under a policy that has none
AUXILIARY_LOSSES = ("router_loss", "router_z_loss")


class Entered(NamedTuple):
    """What has run before the differentiated part of a step; see `LM.enter` and `LM.route`."""

    x_BxTxD: jax.Array
    depth_BxT: jax.Array
    profile: int


def loss_scales(lm: LM, batch: Batch, objective: Objective = NEXT_TOKEN) -> Scales:
    """What the sums of a whole batch are divided by: what the objective counts, and router
    candidates of each step [R].

    Both follow from the segment ids and loss weights alone, so every micro-batch can divide by the
    whole batch's counts: each loss term is then the same number under any gradient accumulation
    (the released trainer scales its terms unequally).
    """
    seg = batch["segment_ids"]
    _, weights = next_token_targets(batch["tokens"], seg, batch.get("weights"))
    real_B = jnp.sum(seg > 0, axis=-1)
    candidates = lm.policy.candidate_counts(real_B, seg.shape[-1])
    return Scales(objective.counts(weights, seg), jnp.maximum(candidates, 1.0))


def loss_fn(
    lm: LM,
    params: Any,
    batch: Batch,
    scales: Scales,
    token_bytes_V: jax.Array | None = None,
    objective: Objective = NEXT_TOKEN,
    *,
    entered: Entered | None = None,
    executor: str | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Loss of one micro-batch against the whole batch's `scales`: that of the objective + the
    policy's weighted auxiliary losses.

    The second result is sums, to be added over micro-batches.

    Args:
      objective: with a frozen model, the batch holds what `Objective.teach` adds.
      entered: what has run already for these rows.
      executor: as in `LM.forward`.
    """
    tokens, seg = batch["tokens"], batch["segment_ids"]
    targets, weights = next_token_targets(tokens, seg, batch.get("weights"))
    x_BxTxD, depth_BxT, profile = entered or (None, None, None)

    def run(
        params: Tree,
        tokens: jax.Array,
        seg: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        depth: jax.Array | None,
        x: jax.Array | None,
        salt: jax.Array | None,
        taught: jax.Array | None,
        tables: Tree | None,
    ) -> tuple[jax.Array, tuple[Sums, RouterStats]]:
        params = lm.with_table(params)
        out = lm.forward(
            params,
            tokens,
            seg,
            mode=TOPK,
            executor=executor,
            profile=profile,
            depth_BxT=depth,
            entered_BxTxD=x,
            salt_B=salt,
        )
        rows = LossInputs(out.h_BxTxD, targets, weights, seg, taught, tables)
        return out.depth_BxT, (objective.sums(lm, params, rows), out.stats)

    def given(x: jax.Array | None, names: Axes | None) -> Axes | None:
        return None if x is None else names

    salt, taught = batch.get("salt"), batch.get("taught")
    tables, table_axes = objective.tables()
    axes = (
        lm.logical_axes(),
        ROW,
        ROW,
        ROW,
        ROW,
        given(depth_BxT, ROW),
        given(x_BxTxD, STATES),
        given(salt, ("batch",)),
        given(taught, objective.taught_axes),
        table_axes,
    )
    depth_BxT, (sums, stats) = over_rows(lm.rules, run, axes, ROW)(
        params, tokens, seg, targets, weights, depth_BxT, x_BxTxD, salt, taught, tables
    )
    nll, count = sums.loss if sums.nll is None else sums.nll, scales.targets
    zero = {name: jnp.zeros(()) for name in AUXILIARY_LOSSES}
    auxiliary = zero | lm.policy.losses(stats, scales.candidates_R)
    loss = sums.loss / count.loss
    loss += sum(w * auxiliary[name] for name, w in lm.policy.loss_weights().items())
    aux = {
        "loss": loss,
        "lm_loss": nll / count.nll,
        **{name: x / count.loss for name, x in sums.figures.items()},
        **auxiliary,
        "depth_sum": jnp.sum(depth_BxT).astype(jnp.float32),
        "tokens": jnp.sum(seg > 0).astype(jnp.float32),
        "nll": jax.lax.stop_gradient(nll),
        "bytes": jnp.sum(
            objective.counted(weights) * (1.0 if token_bytes_V is None else token_bytes_V[targets])
        ),
        "router": jax.lax.stop_gradient(stats),
    }
    return loss, aux


def cut_rows(lm: LM, batch: Batch, length: int) -> Batch:
    """Rows [B, T] as rows [B T / length, length]; the pieces of a row stay on its device."""

    def cut(x: jax.Array) -> jax.Array:
        return lm.rules.constrain(x.reshape(-1, length), "batch", "time")

    return {name: cut(x) for name, x in batch.items()}


def _micro_batches(batch: Batch, accum: int) -> Batch:
    """[B, T] -> [accum, B / accum, T] without moving rows between devices: each keeps its own rows
    throughout."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // accum, accum, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def _grad(
    lm: LM,
    scales: Scales,
    token_bytes_V: jax.Array | None,
    objective: Objective,
    params: Any,
    batch: Batch,
) -> tuple[Any, dict[str, Any]]:
    if lm.recursion.trains:
        return jax.grad(lambda p: loop_loss(lm, p, batch, scales, token_bytes_V), has_aux=True)(
            params
        )
    batch = objective.teach(batch)
    return jax.grad(
        lambda p: loss_fn(lm, p, batch, scales, token_bytes_V, objective), has_aux=True
    )(params)


def _grad_by_profile(
    lm: LM,
    scales: Scales,
    token_bytes_V: jax.Array | None,
    objective: Objective,
    params: Any,
    batch: Batch,
) -> tuple[Any, dict[str, Any]]:
    """As `_grad`, for a policy whose row sizes are known only once the prelude has run.

    The choice of sizes stands outside of the differentiation of the rest, so that one program's
    intermediate results exist at a time (JAX keeps room for those of every branch of a
    differentiated `switch`).
    """
    batch = objective.teach(batch)
    tokens, seg = batch["tokens"], batch["segment_ids"]
    x, pull = jax.vjp(lambda p: lm.enter(p, tokens, seg), params)
    profile, depth_BxT = lm.route(params, x, tokens, seg, batch.get("salt"))

    def rest(profile: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
        def loss(p: Tree, x: jax.Array, depth_BxT: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            entered = Entered(x, depth_BxT, profile)
            return loss_fn(lm, p, batch, scales, token_bytes_V, objective, entered=entered)

        return jax.grad(loss, argnums=(0, 1), has_aux=True)

    count = len(lm.policy.profiles(tokens.shape[-1]))
    (grads, dx), aux = jax.lax.switch(
        profile, [rest(i) for i in range(count)], params, x, depth_BxT
    )
    return jax.tree.map(jnp.add, grads, pull(dx)[0]), aux


def gradients(
    lm: LM,
    params: Any,
    batch: Batch,
    accum: int,
    token_bytes_V: jax.Array | None = None,
    objective: Objective = NEXT_TOKEN,
) -> tuple[Any, dict[str, Any]]:
    """Gradient of the batch loss and the summed metrics, over `accum` micro-batches in sequence."""
    scales = loss_scales(lm, batch, objective)
    many = (
        len(lm.policy.profiles(batch["tokens"].shape[-1])) > 1 and lm.depth.executor == "gathered"
    )
    grad = functools.partial(
        _grad_by_profile if many else _grad, lm, scales, token_bytes_V, objective
    )
    if accum == 1:
        return grad(params, batch)
    micro = _micro_batches(batch, accum)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, params, first))

    def add(total: Any, b: Batch) -> tuple[Any, None]:
        return (jax.tree.map(jnp.add, total, grad(params, b)), None)

    return jax.lax.scan(add, zeros, micro)[0]


def _learned(params: Tree) -> Tree:
    """Without the survey of the router's scores, which is no weight."""
    if SURVEY not in params.get("router", {}):
        return params
    return params | {
        "router": {name: leaf for name, leaf in params["router"].items() if name != SURVEY}
    }


def averaged(average: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """The running mean after one more step. It forgets faster at first, (1 + t) / (10 + t), so that
    the random start is soon gone. What is no weight is taken as it is."""
    keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def mean(path: tuple[DictKey, ...], a: jax.Array, p: jax.Array) -> jax.Array:
        return p if path[-1].key == SURVEY else a + (1 - keep) * (p - a)

    return jax.tree_util.tree_map_with_path(mean, average, params)


def make_train_step(
    lm: LM,
    tx: optax.GradientTransformation,
    accum: int = 1,
    token_bytes_V: jax.Array | None = None,
    objective: Objective = NEXT_TOKEN,
    ema: float = 0.0,
    adapters: Adapters | None = None,
    length: int = 0,
) -> Program:
    """(state, batch, limit=None, beside=None) -> (state, metrics); pure, to be jitted with the
    state donated.

    Args:
      token_bytes_V: bytes of each token, for bits per byte; without it, bits per token.
      objective: what is minimised. The weights of its frozen model, if it has one, are
        `beside["teacher"]`: closed over, they would be constants of the program.
      ema: decay of the running mean of the parameters, of a state that has one.
      adapters: what the state's parameters are, in place of the model's, which are `beside["base"]`
        and stay.
      length: tokens of the pieces that rows are cut into (`config.train.lengths`); 0: they are not.

    A step whose loss, gradient or update is not finite, or whose loss is above `limit` (float32
    scalar), leaves the state as it was; the caller sees it in the metrics.
    """

    def train_step(
        state: TrainState, batch: Batch, limit: jax.Array | None = None, beside: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        frozen = (beside or {}).get("teacher")
        of_step = objective if frozen is None else objective.with_params(frozen)
        whole, pull = state.params, None
        # a step forms the gradient of the whole weights once, and takes the adapters' from it
        if adapters is not None:
            whole, pull = jax.vjp(lambda a: adapters.merged(beside["base"], a), state.params)
        batch = cut_rows(lm, batch, length) if length else batch
        rows = batch["tokens"].shape[0]
        # of each row of each step its own draw, whatever the accumulation and the mesh
        if lm.draws:
            salt_B = state.step.astype(jnp.uint32) * rows + jnp.arange(
                1, rows + 1, dtype=jnp.uint32
            )
            batch = batch | {"salt": lm.rules.constrain(salt_B, "batch")}
        if lm.recursion.sampling != "fixed":
            steps_B = draw(lm.recursion, lm.program.recursions, state.step, rows)
            batch = batch | {"steps": lm.rules.constrain(steps_B, "batch")}
        grads, aux = gradients(lm, whole, batch, accum, token_bytes_V, of_step)
        grads = grads if pull is None else pull(grads)[0]
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        grad_norm, update_norm = optax.tree.norm(grads), optax.tree.norm(updates)
        # Through the update's norm, the choice also comes after everything that reads the old
        # state. So the new state lies beside the old until the norm is known, when activations are
        # gone; without it XLA for CPUs copies the moments before the step, and keeps the copies
        # through it.
        finite = jnp.isfinite(aux["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        good = finite if limit is None else finite & (aux["loss"] <= limit)
        params, router = optax.apply_updates(state.params, updates), aux.pop("router")
        if adapters is None:
            params = params | {"router": lm.policy.rebalance(params["router"], router)}
        average = (
            None if state.average is None else averaged(state.average, params, ema, state.step)
        )
        new = TrainState(state.step + 1, params, opt_state, average)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        metrics = {
            **{
                k: aux[k] for k in ("loss", "lm_loss", *AUXILIARY_LOSSES, *lm.policy.loss_weights())
            },
            **{
                k: v
                for k, v in aux.items()
                if k.startswith(("recursion/", "preference/", "distill_"))
            },
            "bits_per_byte": aux["nll"] / (jnp.maximum(aux["bytes"], 1.0) * math.log(2)),
            "mean_depth": aux["depth_sum"] / jnp.maximum(aux["tokens"], 1.0),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": optax.tree.norm(_learned(new.params)),
        }
        return new, metrics | lm.policy.metrics(router)

    return train_step


class StagedStep:
    """The jitted train step of each stage of training (`LM.stage`), compiled when it is reached.

    Arguments as in `make_train_step`, and `compile(step function, its arguments)`, the program;
    without it, `jax.jit` with the state donated. `length_of`: the length of the rows of step number
    n, from 1. `StagedStep(...)(step, *arguments)` is the program
    for the step after `step` others.
    """

    def __init__(
        self,
        lm: LM,
        tx: optax.GradientTransformation,
        accum: int,
        token_bytes_V: jax.Array | None = None,
        compile: Callable[[Program, tuple[Any, ...]], Program] | None = None,
        objective: Objective = NEXT_TOKEN,
        ema: float = 0.0,
        adapters: Adapters | None = None,
        length_of: Callable[[int], int] | None = None,
    ):
        self._length_of = length_of or (lambda _: 0)
        self._lm, self._rest = lm, (tx, accum, token_bytes_V, objective, ema, adapters)
        self._made: dict[tuple[int | None, int], Program] = {}
        self._compile = compile or (lambda step, _: jax.jit(step, donate_argnums=0))

    def __call__(self, step: int, *arguments: Any) -> Program:
        stage, length = stage_of(self._lm.depth, step), self._length_of(step + 1)
        if (stage, length) not in self._made:
            lm = dataclasses.replace(self._lm, stage=stage)
            # A stage of the warm-up is done when another begins; those of a warm run come again and
            # again.
            kept = {
                key: step
                for key, step in self._made.items()
                if is_warm(lm.depth, key[0]) and key[1] == length
            }
            made = make_train_step(lm, *self._rest, length)
            self._made = kept | {(stage, length): self._compile(made, arguments)}
        return self._made[stage, length]
