"""The whole configuration of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mor_jax.config.depth import DepthConfig
from mor_jax.config.fields import (
    AdapterConfig,
    DataConfig,
    DistillConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PreferenceConfig,
    TrainConfig,
)
from mor_jax.config.recursion import RecursionConfig


@dataclass(frozen=True)
class Config:
    """Everything a run is made of. `name` labels it in reports."""

    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    depth: DepthConfig = field(default_factory=DepthConfig)
    recursion: RecursionConfig = field(default_factory=RecursionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict (JSON-ready); `from_dict` is its inverse."""
        return dataclasses.asdict(self)
