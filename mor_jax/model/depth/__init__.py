"""Depth policies, one a file; `build_policy` turns a configuration into one."""

from __future__ import annotations

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.depth.base import DepthPolicy
from mor_jax.model.depth.expert_choice import ExpertChoice
from mor_jax.model.depth.fixed import Fixed
from mor_jax.model.program import capacities

__all__ = ["DepthPolicy", "ExpertChoice", "Fixed", "build_policy"]


def build_policy(model: ModelConfig, depth: DepthConfig) -> DepthPolicy:
    """The policy of a checked configuration."""
    if depth.policy == "fixed":
        return Fixed(model.recursions)
    return ExpertChoice(
        recursions=model.recursions,
        width=model.width,
        capacities=capacities(model, depth),
        alpha=depth.alpha,
        threshold=depth.threshold,
        init_std=model.init_std,
    )
