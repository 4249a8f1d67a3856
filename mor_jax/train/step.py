"""One optimiser step as a pure function of (state, batch)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

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
from mor_jax.train.distill import Teacher, distilled
from mor_jax.train.loops import loop_loss
from mor_jax.train.preference import Reference, pair_counts, preferred
from mor_jax.train.state import TrainState

# tokens, segment_ids: [B, T] int32; of conversations weights: [B, T] float32; under a model that
# draws salt: [B] uint32; where the number of recursions is drawn, steps: [B] int32; see also
# step_targets of `train/loops.py`
Batch = dict[str, jax.Array]
# a train step: (state, batch, limit, beside) -> (state, metrics)
Program = Callable[..., tuple[TrainState, dict[str, jax.Array]]]

# metrics of every run, 0 under a policy that has none
AUXILIARY_LOSSES = ("router_loss", "router_z_loss")


Scales = tuple[jax.Array, ...]


def loss_scales(lm: LM, batch: Batch, pairs: bool = False) -> Scales:
    """What the sums of a whole batch are divided by: target tokens, and router candidates of each
    step [R]; under preferences (`pairs`) pairs, candidates, and target tokens of the chosen.

    Both follow from the segment ids and loss weights alone, so every micro-batch can divide by the
    whole batch's counts: each loss term is then the same number under any gradient accumulation
    (the released trainer scales its terms unequally).
    """
    seg = batch["segment_ids"]
    _, weights = next_token_targets(batch["tokens"], seg, batch.get("weights"))
    real_B = jnp.sum(seg > 0, axis=-1)
    candidates = lm.policy.candidate_counts(real_B, seg.shape[-1])
    if pairs:
        count, chosen = pair_counts(weights, seg)
        return jnp.maximum(count, 1.0), jnp.maximum(candidates, 1.0), jnp.maximum(chosen, 1.0)
    # A count, not the sum of the weights, which may cancel (advantages of a policy gradient).
    targets = jnp.sum(weights != 0, dtype=jnp.float32)
    return jnp.maximum(targets, 1.0), jnp.maximum(candidates, 1.0)


def loss_fn(
    lm: LM,
    params: Any,
    batch: Batch,
    scales: Scales,
    token_bytes_V: jax.Array | None = None,
    teacher: Teacher | Reference | None = None,
    **of_forward: Any,
) -> tuple[jax.Array, dict[str, Any]]:
    """Loss of one micro-batch against the whole batch's `scales`: LM loss + the policy's weighted
    auxiliary losses.

    The second result is sums, to be added over micro-batches. Keyword arguments go to `LM.forward`.
    With a `teacher` the batch holds its states (`Teacher.teach`), and the LM loss is mixed with the
    distillation loss; with a `Reference` the loss is that of preferences, and `lm_loss` that of the
    chosen conversations."""
    tokens, seg = batch["tokens"], batch["segment_ids"]
    held = isinstance(teacher, Reference)
    target_count, candidates_R, *chosen_count = scales
    targets, weights = next_token_targets(tokens, seg, batch.get("weights"))
    depth, entered = of_forward.pop("depth_BxT", None), of_forward.pop("entered_BxTxD", None)

    def run(
        params: Tree,
        tokens: jax.Array,
        seg: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        depth: jax.Array | None,
        entered: jax.Array | None,
        salt: jax.Array | None,
        taught: jax.Array | None,
        tables: Tree | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None, dict[str, jax.Array], RouterStats]]:
        params = lm.with_table(params)
        how = of_forward | {"depth_BxT": depth, "entered_BxTxD": entered, "salt_B": salt}
        out = lm.forward(params, tokens, seg, mode=TOPK, **how)
        if teacher is None:
            nll = lm.cross_entropy(params, out.h_BxTxD, targets, weights)
            return out.depth_BxT, (nll, None, {}, out.stats)
        assert taught is not None, "of a teacher"
        if isinstance(teacher, Reference):
            sums = preferred(lm, params, out.h_BxTxD, targets, weights, seg, taught, teacher.beta)
            return out.depth_BxT, (*sums, out.stats)
        assert tables is not None, "of a teacher"
        learned, nll, distillation = distilled(
            lm, params, out.h_BxTxD, targets, weights, teacher, tables, taught
        )
        return out.depth_BxT, (learned, nll, {"distill_loss": distillation}, out.stats)

    def given(x: jax.Array | None, names: Axes) -> Axes | None:
        return None if x is None else names

    salt, taught = batch.get("salt"), batch.get("reference" if held else "taught")
    tables, table_axes = teacher.tables() if isinstance(teacher, Teacher) else (None, None)
    axes = (
        lm.logical_axes(),
        ROW,
        ROW,
        ROW,
        ROW,
        given(depth, ROW),
        given(entered, STATES),
        given(salt, ("batch",)),
        given(taught, ROW if held else STATES),
        table_axes,
    )
    depth_BxT, (learned, nll, more, stats) = over_rows(lm.rules, run, axes, ROW)(
        params, tokens, seg, targets, weights, depth, entered, salt, taught, tables
    )
    nll = learned if nll is None else nll
    lm_loss = nll / (chosen_count[0] if held else target_count)
    prefix = "preference/" if held else ""
    zero = {name: jnp.zeros(()) for name in AUXILIARY_LOSSES}
    auxiliary, weight = zero | lm.policy.losses(stats, candidates_R), lm.policy.loss_weights()
    loss = learned / target_count + sum(w * auxiliary[name] for name, w in weight.items())
    aux = {
        "loss": loss,
        "lm_loss": lm_loss,
        **{f"{prefix}{name}": x / target_count for name, x in more.items()},
        **auxiliary,
        "depth_sum": jnp.sum(depth_BxT).astype(jnp.float32),
        "tokens": jnp.sum(seg > 0).astype(jnp.float32),
        "nll": jax.lax.stop_gradient(nll),
        "bytes": jnp.sum(
            (weights > 0 if held else weights != 0)
            * (1.0 if token_bytes_V is None else token_bytes_V[targets])
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
    scales: Any,
    token_bytes_V: jax.Array | None,
    teacher: Teacher | Reference | None,
    params: Any,
    batch: Batch,
) -> tuple[Any, dict[str, Any]]:
    if lm.recursion.trains:
        return jax.grad(lambda p: loop_loss(lm, p, batch, scales, token_bytes_V), has_aux=True)(
            params
        )
    batch = batch if teacher is None else teacher.teach(batch)
    return jax.grad(lambda p: loss_fn(lm, p, batch, scales, token_bytes_V, teacher), has_aux=True)(
        params
    )


def _grad_by_profile(
    lm: LM,
    scales: Any,
    token_bytes_V: jax.Array | None,
    teacher: Teacher | Reference | None,
    params: Any,
    batch: Batch,
) -> tuple[Any, dict[str, Any]]:
    """As `_grad`, for a policy whose row sizes are known only once the prelude has run.

    The choice of sizes stands outside of the differentiation of the rest, so that one program's
    intermediate results exist at a time (JAX keeps room for those of every branch of a
    differentiated `switch`).
    """
    batch = batch if teacher is None else teacher.teach(batch)
    tokens, seg = batch["tokens"], batch["segment_ids"]
    x, pull = jax.vjp(lambda p: lm.enter(p, tokens, seg), params)
    profile, depth_BxT = lm.route(params, x, tokens, seg, batch.get("salt"))

    def rest(profile: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
        def loss(p: Tree, x: jax.Array, depth_BxT: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            how = {"profile": profile, "depth_BxT": depth_BxT, "entered_BxTxD": x}
            return loss_fn(lm, p, batch, scales, token_bytes_V, teacher, **how)

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
    teacher: Teacher | Reference | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Gradient of the batch loss and the summed metrics, over `accum` micro-batches in sequence."""
    scales = loss_scales(lm, batch, isinstance(teacher, Reference))
    many = (
        len(lm.policy.profiles(batch["tokens"].shape[-1])) > 1 and lm.depth.executor == "gathered"
    )
    grad = functools.partial(
        _grad_by_profile if many else _grad, lm, scales, token_bytes_V, teacher
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
    teacher: Teacher | Reference | None = None,
    ema: float = 0.0,
    adapters: Adapters | None = None,
    length: int = 0,
) -> Program:
    """(state, batch, limit=None, beside=None) -> (state, metrics); pure, to be jitted with the
    state donated.

    Args:
      token_bytes_V: bytes of each token, for bits per byte; without it, bits per token.
      teacher: whose predictions are learned, too, or that the model is held to. Its weights are
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
        teaches = None if teacher is None else teacher._replace(params=beside["teacher"])
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
        grads, aux = gradients(lm, whole, batch, accum, token_bytes_V, teaches)
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
        teacher: Teacher | Reference | None = None,
        ema: float = 0.0,
        adapters: Adapters | None = None,
        length_of: Callable[[int], int] | None = None,
    ):
        self._length_of = length_of or (lambda _: 0)
        self._lm, self._rest = lm, (tx, accum, token_bytes_V, teacher, ema, adapters)
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
