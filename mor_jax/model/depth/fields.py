"""Configuration fields that several policies share, with their checks; a policy's configuration
derives from them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from mor_jax.config import ModelConfig
from mor_jax.config.refusals import not_negative, one_of, positive
from mor_jax.errors import ConfigError
from mor_jax.model.depth.base import PolicyConfig
from mor_jax.model.program import tiled

ROUTERS = ("linear", "mlp", "wide_mlp")


def balanced(recursions: int) -> tuple[float, ...]:
    """Shares (R - r + 1) / R: what a perfectly balanced router gives (paper 2.2.1)."""
    return tuple((recursions - r) / recursions for r in range(recursions))


@dataclass(frozen=True)
class Gated(PolicyConfig):
    """A gate on the core's output."""

    gate: str = ""  # one of the policy's `gates`; "": the first
    # scale of the gate; 0: the released code's, 0.1 (1 for scores softmax and none)
    alpha: float = 0.0

    gates: ClassVar[tuple[str, ...]] = ()

    @property
    def gate_name(self) -> str:
        return self.gate or self.gates[0]

    @property
    def gate_scale(self) -> float:
        return self.alpha or 0.1

    def check(self, model: ModelConfig) -> None:
        self._check_word("gate", self.gate, self.gates)
        not_negative("config.depth", alpha=self.alpha)
        super().check(model)

    def _check_word(self, name: str, value: str, fits: tuple[str, ...]) -> None:
        if value and value not in fits:
            raise ConfigError(
                f"config.depth.{name} = {value!r} does not go with policy {self.policy!r}: "
                f"{' or '.join(map(repr, fits))}."
            )


@dataclass(frozen=True)
class Routed(Gated):
    """A router that scores tokens, and the gate that its score makes."""

    router: str = "linear"  # linear | mlp (hidden 2D) | wide_mlp (hidden 4D)
    score: str = ""  # one of the policy's `scores`; "": the first
    temperature: float = 1.0  # the hidden state is divided by it before the router
    z_loss_weight: float = 0.0  # of mean(logsumexp(z)^2)

    scores: ClassVar[tuple[str, ...]] = ()

    @property
    def score_name(self) -> str:
        return self.score or self.scores[0]

    @property
    def gate_scale(self) -> float:
        return self.alpha or (1.0 if self.score_name in ("softmax", "none") else 0.1)

    def check(self, model: ModelConfig) -> None:
        one_of("config.depth.router", self.router, ROUTERS)
        self._check_word("score", self.score, self.scores)
        positive("config.depth", temperature=self.temperature)
        not_negative("config.depth", z_loss_weight=self.z_loss_weight)
        super().check(model)


@dataclass(frozen=True)
class WithCapacities(PolicyConfig):
    """Capacities that training fills row by row."""

    capacities: tuple[float, ...] = ()  # share of the row kept at r = 1..R; (): (R-r+1)/R

    has_capacities: ClassVar[bool] = True
    staged: ClassVar[bool] = True

    def shares(self, model: ModelConfig) -> tuple[float, ...]:
        return tiled(self.capacities or balanced(model.recursions), model.context, self.tile)

    def check(self, model: ModelConfig) -> None:
        where, given = "config.depth.capacities", self.capacities
        if given:
            if len(given) != model.recursions:
                raise ConfigError(
                    f"{where} has {len(given)} entries for recursions = {model.recursions}."
                )
            if not all(0 < c <= 1 for c in given):
                raise ConfigError(f"{where} must lie in (0, 1], got {given}.")
            self._check_order()
        super().check(model)

    def _check_order(self) -> None:
        if any(b > a for a, b in itertools.pairwise(self.capacities)):
            raise ConfigError(
                "config.depth.capacities must not increase (a dropped token never re-enters), got "
                f"{self.capacities}."
            )
