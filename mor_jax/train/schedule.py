"""Learning-rate schedules and the optimiser, all of it optax."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax

from mor_jax import nn
from mor_jax.config import Config, OptimConfig
from mor_jax.model.depth.survey import SURVEY


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """step -> learning rate over a run of `steps`.

    "wsd": linear warm-up, constant, linear cool-down (the paper's trapezoid); "cosine"; "constant" after warm-up.
    """
    warmup = round(config.warmup * steps)
    peak, final = config.peak_lr, config.peak_lr * config.final_lr
    # The first step already learns: step s of a warm-up of W has (s + 1) / W of the peak.
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final_lr)
        return optax.join_schedules([ramp, rest], [warmup])
    if config.schedule == "constant":
        return optax.join_schedules([ramp, optax.constant_schedule(peak)], [warmup])
    decay = round(config.decay * steps)
    down = optax.linear_schedule(peak, final, max(decay, 1))
    return optax.join_schedules([ramp, optax.constant_schedule(peak), down], [warmup, steps - decay])


def is_matrix(params: dict) -> dict:
    """True for the leaves weight decay applies to: everything but vectors and what of a router is moved by rule."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in (*nn.VECTORS, SURVEY), params)


def optimizer(
    config: OptimConfig, steps: int, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decay on matrices only.

    `factors`: on the learning rate of groups of parameters, by the group's name (`DepthConfig.learning_rates`).
    """
    rate = learning_rate(config, steps)

    def adamw(factor: float) -> optax.GradientTransformation:
        return optax.adamw(
            rate if factor == 1 else lambda step: factor * rate(step),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        )

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if not factors:
        return optax.chain(clip, adamw(1.0))

    def labels(params: dict) -> dict:
        group = lambda path: next((key.key for key in path if key.key in factors), "model")
        return jax.tree_util.tree_map_with_path(lambda path, _: group(path), params)

    each = {"model": adamw(1.0)} | {name: adamw(factor) for name, factor in factors.items()}
    return optax.chain(clip, optax.partition(each, labels))


def optimizer_of(cfg: Config, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `steps`."""
    return optimizer(cfg.optim, steps, cfg.depth.learning_rates())
