"""Depth policies, one a file; `build_policy` turns a configuration into one."""

from __future__ import annotations

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.depth.base import DepthPolicy
from mor_jax.model.depth.expert_choice import ExpertChoice
from mor_jax.model.depth.fixed import Fixed

__all__ = ["DepthPolicy", "ExpertChoice", "Fixed", "build_policy", "default_capacities"]


def default_capacities(recursions: int) -> tuple[float, ...]:
    """(R - r + 1) / R for r = 1..R: the shares a balanced token-choice router would give (paper 2.2.1)."""
    return tuple((recursions - r) / recursions for r in range(recursions))


def build_policy(model: ModelConfig, depth: DepthConfig) -> DepthPolicy:
    """The policy of a checked configuration."""
    if depth.policy == "fixed":
        return Fixed(model.recursions)
    return ExpertChoice(
        recursions=model.recursions,
        width=model.width,
        capacities=depth.capacities or default_capacities(model.recursions),
        alpha=depth.alpha,
        threshold=depth.threshold,
        init_std=model.init_std,
    )
