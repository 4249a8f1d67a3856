"""Learning-rate schedules and the optimiser, all of it optax."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax
from jax.tree_util import DictKey
from optax import contrib

from mor_jax import nn
from mor_jax.analysis import accounting
from mor_jax.config import Config, OptimConfig
from mor_jax.model.depth.survey import SURVEY
from mor_jax.nn.parameters import Tree

CORE = "core"  # the shared blocks among the parameters
# Of the matrices of a block, (axes that are summed over, axes of the output); the rest are matrices
# side by side: each head of queries, keys and values, the gate and the up projection.
MATRICES = {
    "qkv": (3, 2),  # [K, G + 2, H, D]
    "out": ((1, 2, 3), 0),  # [D, K, G, H]
    "gate_up": (2, 1),  # [2, F, D]
    "down": (1, 0),  # [D, F]
}
# Muon's update of a matrix is multiplied by this and the root of its longer side: its entries are
# then as large as AdamW's (Liu et al., arXiv 2502.16982), and one learning rate and weight decay
# serve both.
MUON_RMS = 0.2


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """step -> learning rate over a run of `steps`.

    "wsd": linear warm-up, constant, linear cool-down (the paper's trapezoid); "cosine"; "constant"
    after warm-up.
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
    return optax.join_schedules(
        [ramp, optax.constant_schedule(peak), down], [warmup, steps - decay]
    )


def is_matrix(params: Tree) -> Tree:
    """True for the leaves weight decay applies to: everything but vectors and what of a router is
    moved by rule."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in (*nn.VECTORS, SURVEY), params
    )


def matrices(params: Tree) -> Tree:
    """What Muon updates: dimension numbers of the blocks' matrices, None elsewhere."""

    def numbers(path: tuple[DictKey, ...], _: jax.Array) -> contrib.MuonDimensionNumbers | None:
        name = path[-1].key
        return contrib.MuonDimensionNumbers(*MATRICES[name]) if name in MATRICES else None

    return jax.tree_util.tree_map_with_path(numbers, params)


def optimizer(
    config: OptimConfig, steps: int, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decay on matrices only; or Muon of the blocks' matrices,
    AdamW of the rest.

    `factors`: on the learning rate of groups of parameters, by the group's name
    (`DepthConfig.learning_rates`).
    """
    rate = learning_rate(config, steps)

    def one(factor: float) -> optax.GradientTransformation:
        own_rate = rate if factor == 1 else lambda step: factor * rate(step)
        if config.algorithm == "muon":
            return contrib.muon(
                own_rate,
                beta=config.b2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                adam_b1=config.b1,
                adam_b2=config.b2,
                muon_weight_dimension_numbers=matrices,
                consistent_rms=MUON_RMS,
            )
        return optax.adamw(
            own_rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        )

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if not factors:
        return optax.chain(clip, one(1.0))

    each = {"model": one(1.0)} | {name: one(factor) for name, factor in factors.items()}

    def labels(params: Tree) -> Tree:
        def group(path: tuple[DictKey, ...]) -> str:
            return next((key.key for key in path if key.key in each), "model")

        return jax.tree_util.tree_map_with_path(lambda path, _: group(path), params)

    return optax.chain(clip, optax.partition(each, labels))


def optimizer_of(cfg: Config, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `steps`."""
    factors, core = dict(cfg.depth.learning_rates()), core_factor(cfg)
    return optimizer(cfg.optim, steps, factors | ({} if core == 1 else {CORE: core}))


def core_factor(cfg: Config) -> float:
    """Learning rate of the shared core over that of the other blocks.

    An update of a block that a token runs n times enters the function n times, and these changes
    point the same way: to first order the output moves n times as far as by an update of a block
    that is used once. Muon gives every matrix an update of the same size, whatever its gradient, so
    under it the core's rate is divided by n, which leaves each matrix the same share in the step. n
    is the mean over tokens of full rows: R, or the sum of the capacities. AdamW's default stays 1,
    the published recipe.
    """
    if cfg.optim.core_lr:
        return cfg.optim.core_lr
    if cfg.optim.algorithm == "adamw" or cfg.model.recursions == 1:
        return 1.0
    return cfg.model.context / sum(accounting.active_counts(cfg.model, cfg.depth))
