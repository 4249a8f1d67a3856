"""The loss of a training step whose recursions are more than a fixed number with the loss at the
end.

`config.recursion`: a drawn number of steps, a gradient through the last ones, a loss after each
step with weights that are given or learned. `train/step.py` calls `loop_loss` in place of its own
loss then.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mor_jax.model.depth import RouterStats
from mor_jax.model.lm import LM, ROW, STATES
from mor_jax.model.loss import next_token_targets
from mor_jax.model.recursion.loss import divergence, log_prior, log_stopping, step_weights
from mor_jax.model.recursion.unroll import Unrolled
from mor_jax.nn.parameters import Axes, Tree
from mor_jax.parallel.rows import over_rows
from mor_jax.train.objective import Scales


def loop_loss(
    lm: LM,
    params: Any,
    batch: dict[str, jax.Array],
    scales: Scales,
    token_bytes_V: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """As `step.loss_fn`: the trained objective, and sums. `lm_loss` and the bits per byte are those
    of the last step.

    A batch may have step_targets [B, T, M] int32: what each position shall say after step 1..M
    (after later ones, as after M), in place of the next token, under a loss over steps.

    Under a loss over steps the sums hold recursion/<t>/nll, the mean loss after step t in nats a
    token (where the number of steps is fixed, else the mean cannot be told apart by t); under the
    gate also recursion/exit_step, the expected step of stopping, and recursion/divergence from its
    prior."""
    seg = batch["segment_ids"]
    targets, weights = next_token_targets(batch["tokens"], seg, batch.get("weights"))
    target_count = scales.targets.loss

    def run(
        params: Tree,
        tokens: jax.Array,
        seg: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        steps: jax.Array | None,
        salt: jax.Array | None,
        answers: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = lm.with_table(params)
        out, h = lm.unroll(params, tokens, seg, steps_B=steps, salt_B=salt)
        depth_BxT = jnp.where(seg > 0, out.steps_B[:, None], 0)
        if h.ndim == 3:
            nll = lm.cross_entropy(params, h, targets, weights)
            return depth_BxT, {"objective": nll, "nll": nll}
        targets_SxBxT = jnp.broadcast_to(targets, h.shape[:-1])
        if answers is not None:
            index_SxB = jnp.clip(out.index_SxB, 0, answers.shape[-1] - 1)
            targets_SxBxT = jax.vmap(
                lambda i_B: jnp.take_along_axis(answers, i_B[:, None, None], axis=-1)[..., 0]
            )(index_SxB)
        return depth_BxT, _over_steps(lm, params, out, h, targets_SxBxT, weights)

    def given(name: str, axes: Axes) -> Axes | None:
        return None if batch.get(name) is None else axes

    row_only = ("batch",)
    axes = (
        lm.logical_axes(),
        ROW,
        ROW,
        ROW,
        ROW,
        given("steps", row_only),
        given("salt", row_only),
        given("step_targets", STATES),
    )
    depth_BxT, sums = over_rows(lm.rules, run, axes, ROW)(
        params,
        batch["tokens"],
        seg,
        targets,
        weights,
        batch.get("steps"),
        batch.get("salt"),
        batch.get("step_targets"),
    )
    zero = jnp.zeros(())
    loss = sums.pop("objective") / target_count
    nll = sums.pop("nll")
    stats = RouterStats(*[jnp.zeros((lm.program.recursions,))] * 8)
    aux = {
        "loss": loss,
        "lm_loss": nll / target_count,
        "router_loss": zero,
        "router_z_loss": zero,
        "depth_sum": jnp.sum(depth_BxT).astype(jnp.float32),
        "tokens": jnp.sum(seg > 0).astype(jnp.float32),
        "nll": nll,
        "bytes": jnp.sum(
            (weights != 0) * (1.0 if token_bytes_V is None else token_bytes_V[targets])
        ),
        "router": stats,
        **{f"recursion/{name}": value / target_count for name, value in sums.items()},
    }
    return loss, jax.lax.stop_gradient(aux)


def _over_steps(
    lm: LM,
    params: Any,
    out: Unrolled,
    h_SxBxTxD: jax.Array,
    targets_SxBxT: jax.Array,
    weights_BxT: jax.Array,
) -> dict[str, jax.Array]:
    """Sums over the rows of one device of a loss after each step."""
    c, (steps, rows, time, _) = lm.recursion, h_SxBxTxD.shape

    # One after the other along time, so that the head's chunks hold as many logits at once as for
    # one step.
    def along(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(rows, steps * time, *x.shape[3:])

    def apart(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(rows, steps, time), 1, 0)

    h, targets = along(h_SxBxTxD), along(targets_SxBxT)
    still = jax.lax.stop_gradient
    nll_SxBxT = apart(still(lm.token_nll(still(params), still(h), targets)))
    sums = {"nll": jnp.sum(nll_SxBxT[-1] * weights_BxT)}
    if c.sampling == "fixed":
        # of the last steps, or of the end of each segment
        stride = lm.program.recursions // c.segments if c.segments > 1 else 1
        numbers = [lm.program.recursions - stride * t for t in reversed(range(steps))]
        sums |= {f"{n}/nll": jnp.sum(nll_SxBxT[t] * weights_BxT) for t, n in enumerate(numbers)}
    if c.loss != "gate":
        share_SxB = step_weights(c, out.index_SxB)
        weights = along(share_SxB[..., None] * weights_BxT)
        return sums | {"objective": lm.cross_entropy(params, h, targets, weights)}
    assert out.states_SxBxTxD is not None, "kept for a loss over steps"
    log_p = log_stopping(lm.loop.gate(params["recursion"], out.states_SxBxTxD))
    p_SxBxT = jnp.exp(log_p)
    counted_BxT = (weights_BxT != 0).astype(jnp.float32)
    away = jnp.sum(divergence(log_p, log_prior(c, steps)) * counted_BxT)
    # `cross_entropy` has no gradient for its weights, so the gate's own comes from the losses as
    # numbers.
    expected = lm.cross_entropy(params, h, targets, along(still(p_SxBxT) * weights_BxT))
    expected += jnp.sum((p_SxBxT - still(p_SxBxT)) * nll_SxBxT * weights_BxT)
    number_S = jnp.arange(1, steps + 1, dtype=jnp.float32)
    stop = jnp.sum(p_SxBxT * number_S[:, None, None] * counted_BxT)
    return sums | {
        "objective": expected + c.gate_weight * away,
        "exit_step": stop,
        "divergence": away,
    }
