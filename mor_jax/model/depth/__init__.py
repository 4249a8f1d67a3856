"""Depth policies, one a file; every file of this package is imported with it, so a policy is known
by being here.

`build_policy` turns a configuration into a policy; `mor_jax.config.depth_policies` lists them by
name. How to add one is in CONTRIBUTING.md.
"""

from __future__ import annotations

import importlib
import pkgutil

from mor_jax.config import DepthConfig, ModelConfig
from mor_jax.model.depth.base import (
    AtOnce,
    Counts,
    DepthPolicy,
    PolicyConfig,
    Route,
    RouterStats,
    TokenInfo,
)
from mor_jax.model.depth.control import Controlled, DepthControl
from mor_jax.model.depth.expert_choice import ExpertChoice
from mor_jax.model.depth.fixed import Fixed
from mor_jax.model.depth.random_choice import RandomChoice
from mor_jax.model.depth.token_choice import TokenChoice

__all__ = [
    "AtOnce",
    "Controlled",
    "Counts",
    "DepthControl",
    "DepthPolicy",
    "ExpertChoice",
    "Fixed",
    "PolicyConfig",
    "RandomChoice",
    "Route",
    "RouterStats",
    "TokenChoice",
    "TokenInfo",
    "build_policy",
]

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")


def build_policy(model: ModelConfig, depth: DepthConfig, stage: int | None = None) -> DepthPolicy:
    """The policy of a checked configuration, in this stage of training (`LM.stage`)."""
    if not isinstance(depth, PolicyConfig):
        raise TypeError(f"{type(depth).__name__} must derive from PolicyConfig to be built")
    return depth.build(model, stage)
