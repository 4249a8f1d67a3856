"""The typed configuration: frozen dataclasses, built from an `ml_collections.ConfigDict` and
validated.

A config file under `configs/` returns a ConfigDict with any subset of the fields
(`config/fields.py`, `config/depth.py`, `config/recursion.py`);
`from_config_dict` fills in the defaults, refuses unknown names (naming the nearest valid one) and
contradictions, and returns a `Config` whose parts are hashable and so usable as static arguments of
`jax.jit`.

Nothing here touches a device, and only `saved_config` reads a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mor_jax.config.check_model import check_model, unshared_ends
from mor_jax.config.check_train import check_data, check_train
from mor_jax.config.config import Config
from mor_jax.config.depth import (
    DepthConfig,
    depth_defaults,
    depth_policies,
    refuse_other_policies,
    switched,
)
from mor_jax.config.fields import (
    ATTENTION,
    DTYPES,
    REMAT,
    AdapterConfig,
    DataConfig,
    DistillConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PreferenceConfig,
    TrainConfig,
)
from mor_jax.config.mesh import MeshShape, check_mesh, mesh_shape
from mor_jax.config.parse import from_dict, saved_config
from mor_jax.config.recursion import RecursionConfig, check_recursion
from mor_jax.errors import ConfigError

__all__ = [
    "ATTENTION",
    "DTYPES",
    "REMAT",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "DepthConfig",
    "DistillConfig",
    "MeshConfig",
    "MeshShape",
    "ModelConfig",
    "OptimConfig",
    "PreferenceConfig",
    "RecursionConfig",
    "TrainConfig",
    "check",
    "depth_defaults",
    "depth_policies",
    "from_config_dict",
    "from_dict",
    "mesh_shape",
    "saved_config",
    "switched",
    "unshared_ends",
]


def from_config_dict(config: Mapping[str, Any], *, devices: int = 1) -> Config:
    """Build and check a `Config`.

    Args:
      config: a ConfigDict or a nested dict with any subset of the fields.
      devices: number of devices the mesh will span.
    Raises:
      ConfigError: an unknown field, a wrong type, values that do not go together, or a field of
        another depth policy than the chosen one that is set to anything but its default.
    """
    raw = config.to_dict() if hasattr(config, "to_dict") else config
    cfg = from_dict(raw)
    refuse_other_policies(raw.get("depth", {}))
    check(cfg, devices=devices)
    return cfg


def check(cfg: Config, *, devices: int = 1) -> None:
    """Raise ConfigError for the first value or combination of values that cannot be run."""
    check_model(cfg.model)
    if cfg.model.bidirectional:
        raise ConfigError(
            "config.model.bidirectional = True lets a token see the one that it is to predict, so rows of text cannot train "
            "it. Remove it, or train on puzzles with mor_jax.train.segments."
        )
    cfg.depth.check(cfg.model)
    check_recursion(cfg.recursion, cfg.model, cfg.depth)
    check_data(cfg.data)
    check_train(cfg)
    check_mesh(cfg, devices)
