"""Every k-th token goes deep: the depth of a token is set by its position in its document, and
nothing is learned.

Tokens k, 2k, 3k, ... of a document run all R recursions, the others `shallow` of them. A control
for learned routing at equal FLOPs, like random routing, but with a pattern that is the same in
training and in decoding, token by token. A document of n tokens has floor(n / k) deep ones, so a
row of T holds at most floor(T / k), whatever documents it is packed from: the row sizes of the
gathered executor are known beforehand, and nothing is ever dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.errors import ConfigError
from mor_jax.model.depth.base import AtOnce, PolicyConfig, TokenInfo
from mor_jax.nn.parameters import Tree


@dataclass(frozen=True)
class EveryKthConfig(PolicyConfig):
    """Every k-th token of a document runs all recursions."""

    policy: str = "every_kth"
    every: int = 2  # k
    shallow: int = 1  # recursions of the other tokens, 1..R

    at_once: ClassVar[bool] = True
    exported: ClassVar[bool] = True
    does: ClassVar[str] = "sets the depth of a token by its position"

    def check(self, model: ModelConfig) -> None:
        if not 1 <= self.every <= model.context:
            raise ConfigError(
                f"config.depth.every = {self.every} must be from 1 to config.model.context = {model.context} tokens: no "
                "row has a token that late."
            )
        if not 1 <= self.shallow <= model.recursions:
            raise ConfigError(
                f"config.depth.shallow = {self.shallow} must be from 1 to config.model.recursions = {model.recursions}."
            )
        super().check(model)

    def shares(self, model: ModelConfig) -> tuple[float, ...]:
        return self.build(model).shares()

    def build(self, model: ModelConfig, stage: int | None = None) -> EveryKth:
        return EveryKth(model.recursions, self.every, self.shallow, self.tile)


@dataclass(frozen=True)
class EveryKth(AtOnce):
    """`every`: k. `shallow`: recursions of the others. `tile`: row sizes are multiples of it."""

    recursions: int
    every: int
    shallow: int = 1
    tile: int = 1

    def depths(
        self, routers: Tree, h_BxTxD: jax.Array, info: TokenInfo, dial_BxR: jax.Array | None = None
    ) -> jax.Array:
        deep_BxT = (info.pos_BxT + 1) % self.every == 0
        return jnp.where(deep_BxT, self.recursions, self.shallow).astype(jnp.int32)

    def profiles(self, length: int) -> tuple[tuple[int, ...], ...]:
        deep = min(length, -(-max(1, length // self.every) // self.tile) * self.tile)
        return ((length,) * self.shallow + (deep,) * (self.recursions - self.shallow),)

    def shares(self) -> tuple[float, ...]:
        # Just above 1 / k, so that the floor of this share of a row of k tokens is one.
        return (1.0,) * self.shallow + (min(1.0, 1 / self.every + 1e-9),) * (
            self.recursions - self.shallow
        )
