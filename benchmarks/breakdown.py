"""The dense training step in pieces, each compiled and timed on its own: where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.record import Samples, clock
from mor_jax import nn
from mor_jax.analysis import accounting
from mor_jax.model import block as network
from mor_jax.model.lm import positions_in_document
from mor_jax.model.loss import next_token_targets
from mor_jax.train.step import gradients, loss_fn, loss_scales

# AdamW reads a parameter, its gradient and two moments and writes all but the gradient; clipping
# reads the gradient once more. float32.
OPTIMIZER_BYTES = 4 * 8


class Piece:
    """One compiled piece. `flops` or `bytes_moved` is the least it has to do."""

    def __init__(
        self, name: str, work: Callable[[], Any], *, flops: float = 0.0, bytes_moved: float = 0.0
    ):
        self.name, self.flops, self.bytes_moved = name, flops, bytes_moved
        self.samples = Samples()
        self._work = work
        jax.block_until_ready(work())  # compiles

    def once(self) -> tuple[float, float]:
        return clock(lambda: jax.block_until_ready(self._work()))


def pieces(run: Any) -> list[Piece]:
    """Pieces of the step of `run` (a dense `ModelRun`); they share its parameters. Attention and
    MLP are chained through all layers with each layer's own weights, without norms and without
    rematerialisation."""
    cfg, lm, batch = run.cfg, run.lm, run.batch
    m, tokens = cfg.model, accounting.tokens_per_step(cfg)
    flops = accounting.true_flops_per_token(m, cfg.depth)
    mlp_flops = 2 * 3 * m.width * m.mlp_width * m.layers

    def params():
        return run.state.params  # looked up at every call: a step gives the old ones away

    def layers(part):
        return [params()["core"][str(i)][part] for i in range(m.layers)]

    heads, kv_heads, head_dim = m.dims
    rows, length = batch["tokens"].shape

    def normal(i, *shape):
        return jax.random.normal(jax.random.key(i), shape, m.dtype)

    x, dx = normal(0, rows, length, m.width), normal(1, rows, length, m.width)
    q, dq = (normal(i, rows, kv_heads, heads // kv_heads, length, head_dim) for i in (2, 3))
    k, v = (normal(i, rows, kv_heads, length, head_dim) for i in (4, 5))

    def attend(batch):
        seg = batch["segment_ids"]
        pos = positions_in_document(seg)
        return lambda q, k, v: (nn.attention(q, k, v, pos, pos, seg, seg, m.attention), None)

    def attention_layers(batch, weights, x):
        rope = lm.rope(positions_in_document(batch["segment_ids"]))
        for w in weights:
            x = x + network.attention(m, w, x, rope, attend(batch))[0]
        return x

    def attention_core(batch, q, k, v):
        for _ in range(m.layers):
            q = attend(batch)(q, k, v)[0]
        return q

    def mlp_layers(_, weights, x):
        for w in weights:
            x = x + network.mlp(w, x)
        return x

    def head(batch, h, table):
        targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"])
        return lm.cross_entropy({"embed": {"table": table}}, h, targets, weights)

    def there_and_back(f):
        """(gradient of the output, *args) -> output of f and the gradients of its arguments, on
        this batch."""

        def run_both(batch, gradient, *args):
            y, pull = jax.vjp(lambda *args: f(batch, *args), *args)
            return y, pull(gradient)

        compiled = jax.jit(run_both)
        return lambda gradient, *args: compiled(batch, gradient, *args)

    forward = jax.jit(lambda p, batch: loss_fn(lm, p, batch, loss_scales(lm, batch))[0])
    both = jax.jit(lambda p, batch: gradients(lm, p, batch, 1)[0])

    def update(params, opt_state, grads):
        updates, opt_state = run.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    update = jax.jit(update, donate_argnums=(0, 1))
    grads = jax.block_until_ready(both(params(), batch))

    def optimize():
        state = run.state
        new, opt_state = update(state.params, state.opt_state, grads)
        run.state = state._replace(params=new, opt_state=opt_state)
        return run.state

    attention_both, core_both, mlp_both = (
        there_and_back(f) for f in (attention_layers, attention_core, mlp_layers)
    )
    head_both = there_and_back(head)
    one = jnp.float32(1)
    attention_flops = flops.blocks - mlp_flops + flops.attention
    count = accounting.parameters(m, cfg.depth).total
    return [
        Piece("forward", lambda: forward(params(), batch), flops=flops.total * tokens),
        Piece("forward + backward", lambda: both(params(), batch), flops=flops.training * tokens),
        Piece("optimizer", optimize, bytes_moved=OPTIMIZER_BYTES * count),
        Piece(
            "head + loss",
            lambda: head_both(one, x, params()["embed"]["table"]),
            flops=3 * flops.head * tokens,
        ),
        Piece("MLP", lambda: mlp_both(dx, layers("mlp"), x), flops=3 * mlp_flops * tokens),
        Piece(
            "attention",
            lambda: attention_both(dx, layers("attention"), x),
            flops=3 * attention_flops * tokens,
        ),
        Piece("attention core", lambda: core_both(dq, q, k, v), flops=3 * flops.attention * tokens),
    ]


def analyse(
    step: float, parts: list[Piece], torch: dict[str, float] | None
) -> list[dict[str, Any]]:
    """Rows of the breakdown: name, seconds, share of the step, rate, and torch's seconds where they
    mean the same.

    `step`: median seconds of the whole step.
    """
    t = {p.name: p.samples.median for p in parts}
    need = {p.name: (p.flops, p.bytes_moved) for p in parts}
    both, parts_of_both = t["forward + backward"], ("MLP", "attention", "head + loss")
    torch = torch or {}

    def row(
        name: str,
        seconds: float,
        level: int,
        flops: float = 0.0,
        bytes_moved: float = 0.0,
        peer: str = "",
    ):
        return {
            "name": name,
            "level": level,
            "seconds": seconds,
            "share_of_step": seconds / step,
            "flops_per_second": flops / seconds if flops and seconds > 0 else None,
            "bytes_per_second": bytes_moved / seconds if bytes_moved and seconds > 0 else None,
            "torch_seconds": torch.get(peer),
        }

    ahead, all_flops = need["forward"][0], need["forward + backward"][0]
    return [
        row("whole step", step, 0, all_flops) | {"torch_seconds": sum(torch.values()) or None},
        row("forward", t["forward"], 1, ahead, peer="forward"),
        row(
            "backward (the difference)", both - t["forward"], 1, all_flops - ahead, peer="backward"
        ),
        row(
            "optimizer, clipping included", t["optimizer"], 1, *need["optimizer"], peer="optimizer"
        ),
        row("rest: metrics, finiteness check", step - both - t["optimizer"], 1),
        row("forward + backward", both, 0, all_flops)
        | {"torch_seconds": _sum(torch, "forward", "backward")},
        row("head + loss", t["head + loss"], 1, *need["head + loss"]),
        row("MLP, all layers", t["MLP"], 1, *need["MLP"]),
        row("attention, all layers", t["attention"], 1, *need["attention"]),
        row("of it scores and values", t["attention core"], 2, *need["attention core"]),
        row("rest: norms, residuals, embedding", both - sum(t[n] for n in parts_of_both), 1),
    ]


def _sum(torch: dict[str, float], *names: str) -> float | None:
    return sum(torch[n] for n in names) if torch else None
