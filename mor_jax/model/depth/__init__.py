"""Depth policies, one a file; `build_policy` turns a configuration into one."""

from __future__ import annotations

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.depth.base import DepthPolicy, Route, RouterStats
from mor_jax.model.depth.control import Controlled, DepthControl
from mor_jax.model.depth.expert_choice import ExpertChoice
from mor_jax.model.depth.fixed import Fixed
from mor_jax.model.depth.random_choice import RandomChoice
from mor_jax.model.depth.token_choice import TokenChoice
from mor_jax.model.depth.warmup import shares_in
from mor_jax.model.program import build_program

__all__ = [
    "Controlled", "DepthControl", "DepthPolicy", "ExpertChoice", "Fixed", "RandomChoice", "Route", "RouterStats",
    "TokenChoice", "build_policy",
]  # fmt: skip


def build_policy(model: ModelConfig, depth: DepthConfig, stage: int | None = None) -> DepthPolicy:
    """The policy of a checked configuration, in this stage of its warm-up (None: warm)."""
    if depth.policy == "fixed":
        return Fixed(build_program(model).recursions)
    shares = shares_in(model, depth, stage)
    if depth.policy == "random":
        return RandomChoice(model.recursions, shares, depth.gate_scale, depth.gate_name, depth.seed)
    shared = dict(
        recursions=model.recursions,
        width=model.width,
        alpha=depth.gate_scale,
        init_std=model.init_std,
        score_name=depth.score_name,
        gate=depth.gate_name,
        router=depth.router,
        temperature=depth.temperature,
        z_loss_weight=depth.z_loss_weight,
    )
    if depth.policy == "token_choice":
        return TokenChoice(
            **shared,
            balance_loss_weight=depth.balance_loss_weight,
            bias_rate=depth.bias_rate,
            buckets=depth.buckets,
            tile=depth.tile,
            all_deep=stage is not None,
        )
    return ExpertChoice(
        **shared,
        capacities=shares,
        threshold=depth.threshold,
        aux_loss_weight=depth.aux_loss_weight,
        inference=depth.inference,
    )
