"""The recursion part of a configuration: what one step over the shared core reads, and how the
steps are trained.

Each knob has a word, and each word is one small function or class in `mor_jax/model/recursion/`, in
the file that is named after the knob. `choices` finds the words there at run time, as
`config/depth.py` finds the policies. With every field at its default the programs are those of a
model without this section.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from mor_jax.config.check_model import unshared_ends
from mor_jax.config.fields import ModelConfig
from mor_jax.config.refusals import one_of
from mor_jax.errors import ConfigError

if TYPE_CHECKING:
    from mor_jax.config.depth import DepthConfig

HOME = "mor_jax.model.recursion"
# fields that take a word of their file
KNOBS = ("state", "injection", "conditioning", "sampling", "loss", "exit")
BEYOND = ("refuse", "clamp", "modulo")
SCOPES = ("batch", "sequence")
PRIORS = ("uniform", "geometric")
MISSING = ("latest", "skip")
WHERE = "config.recursion"


@dataclass(frozen=True)
class RecursionConfig:
    """How the steps over the shared core are made and trained. Policy "fixed" only, unless all is
    at its default."""

    # What a step reads
    # before the first step: embed (the prelude's output) | zeros | const (learned) | random
    state: str = "embed"
    state_std: float = 0.0  # random: standard deviation of an element; 0: sqrt(2 / 5), as in Huginn
    # of the prelude's output at each step: none | add | channel | concat | diagonal
    injection: str = "none"
    conditioning: str = "none"  # on the number of the step: none | sinusoid | learned | time
    # learned conditioning past the trained recursions: refuse | clamp | modulo
    beyond: str = "refuse"
    loop_norm: bool = False  # an RMSNorm of the state after each step, as in Ouro
    # How many steps training runs
    # fixed | lognormal_poisson | poisson | binomial | uniform; mean: config.model.recursions
    sampling: str = "fixed"
    # one number for the batch, or one for each sequence: batch | sequence
    sampling_scope: str = "batch"
    sampling_sigma: float = 0.5  # lognormal_poisson
    sampling_skip: float = 0.5  # binomial: chance that each round after the first is left out
    sampling_most: int = 0  # steps at most; 0: twice the recursions (binomial: the recursions)
    gradient_steps: int = 0  # the gradient goes through the last so many steps; 0: through all
    # What training asks of the steps
    loss: str = "final"  # final | uniform | power | decay | gate
    loss_power: float = 1.0  # power: step t weighs t^power
    loss_decay: float = 0.7  # decay: step t weighs decay^(t-1)
    gate_prior: str = "uniform"  # gate: uniform (entropy bonus, Ouro) | geometric (PonderNet)
    gate_weight: float = 0.05  # gate: of the divergence from the prior
    gate_rate: float = 0.2  # gate, geometric: chance of the prior to stop at each step
    # When a token stops at inference
    # fixed | latent | cosine | acceleration | kl | entropy | argmax | cdf | draw
    exit: str = "fixed"
    exit_threshold: float = 0.0
    exit_least: int = 1  # steps every token runs
    # keys of tokens that stopped, at later steps: latest (their newest) | skip (none)
    missing: str = "latest"

    @property
    def reads(self) -> bool:
        """Whether a step is more than the core alone."""
        return (self.state, self.injection, self.conditioning, self.loop_norm) != (
            "embed",
            "none",
            "none",
            False,
        )

    @property
    def trains(self) -> bool:
        """Whether training is more than the loss after a fixed number of steps."""
        return (self.sampling, self.gradient_steps, self.loss) != ("fixed", 0, "final")

    @property
    def exits(self) -> bool:
        """Whether tokens may stop before the last step at inference."""
        return self.exit != "fixed"

    def most(self, recursions: int) -> int:
        """Steps at most in training."""
        if self.sampling == "fixed":
            return recursions
        return self.sampling_most or recursions * (1 if self.sampling == "binomial" else 2)


def choices(knob: str) -> tuple[str, ...]:
    """The words that a knob takes."""
    return tuple(importlib.import_module(f"{HOME}.{knob}").CHOICES)


def check_recursion(c: RecursionConfig, m: ModelConfig, depth: DepthConfig) -> None:
    """Raise ConfigError for the first value, or the first two values together, that cannot be
    run."""
    for knob in KNOBS:
        one_of(f"{WHERE}.{knob}", getattr(c, knob), choices(knob))
    for name, words in (
        ("beyond", BEYOND),
        ("sampling_scope", SCOPES),
        ("gate_prior", PRIORS),
        ("missing", MISSING),
    ):
        one_of(f"{WHERE}.{name}", getattr(c, name), words)
    _check_numbers(c)
    if not (c.reads or c.trains or c.exits):
        return
    if depth.routed:
        first = next(f.name for f in fields(c) if getattr(c, f.name) != f.default)
        raise ConfigError(
            f"{WHERE}.{first} = {getattr(c, first)!r} goes with config.depth.policy = 'fixed': a routed token has a gate "
            f"and a depth of its own from policy {depth.policy!r}. Use one of the two."
        )
    if m.sharing == "none" or m.sharing.endswith("sequence"):
        raise ConfigError(
            f"config.recursion says how a whole core is applied again, but config.model.sharing = {m.sharing!r} has no "
            "such core. Use sharing = 'cycle' or 'middle_cycle'."
        )
    _check_reads(c, m)
    _check_training(c, m, depth)
    _check_exit(c, m, depth)


def _check_numbers(c: RecursionConfig) -> None:
    for name in ("state_std", "sampling_sigma", "loss_power", "gate_weight", "exit_threshold"):
        if not 0 <= getattr(c, name) < float("inf"):
            raise ConfigError(
                f"{WHERE}.{name} must be a number and not negative, got {getattr(c, name)}."
            )
    if not 0 <= c.sampling_skip < 1:
        raise ConfigError(
            f"{WHERE}.sampling_skip is a chance and must be in [0, 1), got {c.sampling_skip}."
        )
    for name in ("loss_decay", "gate_rate"):
        if not 0 < getattr(c, name) < 1:
            raise ConfigError(f"{WHERE}.{name} must be between 0 and 1, got {getattr(c, name)}.")
    for name, least in (("gradient_steps", 0), ("sampling_most", 0), ("exit_least", 1)):
        if getattr(c, name) < least:
            raise ConfigError(f"{WHERE}.{name} must be at least {least}, got {getattr(c, name)}.")


def _check_reads(c: RecursionConfig, m: ModelConfig) -> None:
    if c.state != "embed" and c.injection == "none":
        raise ConfigError(
            f"{WHERE}.state = {c.state!r} with injection = 'none': no step would ever see the input. Set injection, or "
            "use state = 'embed'."
        )


def _check_training(c: RecursionConfig, m: ModelConfig, depth: DepthConfig) -> None:
    k, r = c.gradient_steps, m.recursions
    short = 0 < k < c.most(r)
    if c.trains and depth.kv_name != "full":
        raise ConfigError(
            f"config.depth.kv = {depth.kv_name!r} looks back on the keys of step 1, but {WHERE}.sampling, gradient_steps "
            "and loss run steps whose first one is not the same for all rows, or has no gradient. Use kv = 'full'."
        )
    if c.sampling != "fixed" and r < 2:
        raise ConfigError(
            f"{WHERE}.sampling = {c.sampling!r} varies around config.model.recursions = {r}; give 2 or more."
        )
    if c.sampling != "fixed" and c.most(r) < r:
        raise ConfigError(
            f"{WHERE}.sampling_most = {c.sampling_most} is below config.model.recursions = {r}, the mean. Raise it."
        )
    if c.sampling != "fixed" and (m.lora_rank or m.norms == "own" or m.recursion_encoding):
        raise ConfigError(
            f"{WHERE}.sampling = {c.sampling!r} runs steps past the last, for which config.model.lora_rank, norms = 'own' "
            "and recursion_encoding have nothing. Use sampling = 'fixed', or leave those out."
        )
    if (
        c.sampling != "fixed"
        and c.conditioning == "learned"
        and c.beyond == "refuse"
        and c.most(r) > r
    ):
        raise ConfigError(
            f"{WHERE}.conditioning = 'learned' has a row for each of {r} steps, but sampling = {c.sampling!r} runs up to "
            f"{c.most(r)}. Set beyond = 'clamp' or 'modulo', or conditioning = 'sinusoid' or 'time'."
        )
    if short and c.injection == "none":
        raise ConfigError(
            f"{WHERE}.gradient_steps = {k} with injection = 'none': embedding and prelude would get no gradient through "
            "the steps before. Set injection, or gradient_steps = 0."
        )
    if short and c.state == "const":
        raise ConfigError(
            f"{WHERE}.gradient_steps = {k} with state = 'const': the learned state would get no gradient. Use state = "
            "'zeros', 'embed' or 'random', or gradient_steps = 0."
        )
    own = "conditioning" if c.conditioning == "learned" else ""
    own = own or next(
        (name for name in ("lora_rank", "recursion_encoding") if getattr(m, name)), ""
    )
    own = own or ("norms" if m.norms == "own" else "")
    if short and own:
        section = WHERE if own == "conditioning" else "config.model"
        raise ConfigError(
            f"{WHERE}.gradient_steps = {k} with {section}.{own}: what the steps before the last {k} have of their own "
            "would get no gradient. Leave one of the two out."
        )
    if c.loss == "gate" and short:
        raise ConfigError(
            f"{WHERE}.loss = 'gate' with gradient_steps = {k}: the gate of the steps before would get no gradient. Use "
            "gradient_steps = 0."
        )
    if c.loss == "gate" and c.sampling != "fixed":
        raise ConfigError(
            f"{WHERE}.loss = 'gate' learns how many steps to run, and sampling = {c.sampling!r} draws it. Use one of the "
            "two."
        )


def _check_exit(c: RecursionConfig, m: ModelConfig, depth: DepthConfig) -> None:
    if not c.exits:
        return
    if depth.kv_name != "full":
        raise ConfigError(
            f"{WHERE}.exit = {c.exit!r} needs keys of every step, with {WHERE}.missing for tokens that stopped, but "
            f"config.depth.kv = {depth.kv_name!r}. Use kv = 'full'."
        )
    if c.exit in ("cdf", "draw") and c.loss != "gate":
        raise ConfigError(
            f"{WHERE}.exit = {c.exit!r} reads the learned gate, which only loss = 'gate' trains. Set it."
        )
    coda = unshared_ends(m)[1]
    if c.exit in ("kl", "entropy", "argmax") and coda:
        raise ConfigError(
            f"{WHERE}.exit = {c.exit!r} compares what the head says after each step, but {coda} blocks stand between "
            "core and head, whose keys of later steps do not exist yet. Use exit = 'latent', 'cosine', 'acceleration', "
            "'cdf' or 'draw', or config.model.coda = 0."
        )
    if c.exit_least > m.recursions:
        raise ConfigError(
            f"{WHERE}.exit_least = {c.exit_least} is more than config.model.recursions = {m.recursions}."
        )
