"""The program: which block runs when, as static data.

    x -> prelude (own weights) -> core x R (shared weights) -> coda (own weights)

`none` and `cycle` have no prelude and coda; `middle_cycle` keeps the first and last layer unique (paper, table 1;
the scheme adopted for every Mixture-of-Recursions model there). A plain Transformer is R = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from mor_jax.config import ModelConfig, unshared_ends


@dataclass(frozen=True)
class Program:
    """Block counts of each part and the number of times the core is applied."""

    prelude: int
    core: int
    coda: int
    recursions: int

    @property
    def unique_layers(self) -> int:
        """Blocks with weights of their own."""
        return self.prelude + self.core + self.coda

    @property
    def unrolled_layers(self) -> int:
        """Block applications a token of full depth goes through."""
        return self.prelude + self.core * self.recursions + self.coda


def build_program(model: ModelConfig) -> Program:
    """The program of a checked model configuration (`config.check` refuses layer counts that do not divide)."""
    ends = unshared_ends(model.sharing)
    return Program(
        prelude=ends // 2,
        core=(model.layers - ends) // model.recursions,
        coda=ends - ends // 2,
        recursions=model.recursions,
    )
