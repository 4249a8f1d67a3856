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
KNOBS = ("state", "injection", "conditioning", "sampling", "solver", "adjoint", "loss", "exit")
BEYOND = ("refuse", "clamp", "modulo")
SCOPES = ("batch", "sequence")
PRIORS = ("uniform", "geometric")
MISSING = ("latest", "skip")
WHERE = "config.recursion"
# first words of fields that say who recurses how often, or what training asks of it
OF_TRAINING = (
    "sampling",
    "gradient",
    "segments",
    "solver",
    "tolerance",
    "adjoint",
    "loss",
    "gate",
    "exit",
    "missing",
)


@dataclass(frozen=True)
class RecursionConfig:
    """How the steps over the shared core are made and trained. What a step reads goes with every
    depth policy, the rest with "fixed"."""

    # What a step reads
    # before the first step: embed (the prelude's output) | zeros | const (learned) | drawn (const,
    # not learned) | random
    state: str = "embed"
    state_std: float = 0.0  # random: standard deviation of an element; 0: sqrt(2 / 5), as in Huginn
    # of the prelude's output at each step: none | add | channel | concat | diagonal
    injection: str = "none"
    conditioning: str = "none"  # on the number of the step: none | sinusoid | learned | time
    # learned conditioning past the trained recursions: refuse | clamp | modulo
    beyond: str = "refuse"
    loop_norm: bool = False  # an RMSNorm of the state after each step, as in Ouro
    # updates of a second state z before each update of the first, y (HRM, TRM); 0: one state. Each
    # update is one of config.model.recursions
    inner: int = 0
    # How many steps training runs
    # fixed | lognormal_poisson | poisson | binomial | uniform; mean: config.model.recursions
    sampling: str = "fixed"
    # one number for the batch, or one for each sequence: batch | sequence
    sampling_scope: str = "batch"
    sampling_sigma: float = 0.5  # lognormal_poisson
    sampling_skip: float = 0.5  # binomial: chance that each round after the first is left out
    sampling_most: int = 0  # steps at most; 0: twice the recursions (binomial: the recursions)
    # the gradient goes through the last so many steps (of each segment); 0: through all
    gradient_steps: int = 0
    # equal parts that the steps are cut into: no gradient crosses from one to the next, and each
    # has a loss at its end (the deep supervision of HRM and TRM)
    segments: int = 1
    # Equilibrium: training runs steps until a fixed point, at most config.model.recursions, and
    # takes its gradient: none | picard | anderson
    solver: str = "none"
    tolerance: float = 1e-3  # of the relative residual of every token
    adjoint: str = "neumann"  # neumann | anderson
    adjoint_steps: int = 0  # neumann: terms after the first; anderson: at most
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
        return (self.state, self.injection, self.conditioning, self.loop_norm, self.inner) != (
            "embed",
            "none",
            "none",
            False,
            0,
        )

    @property
    def trains(self) -> bool:
        """Whether training is more than the loss after a fixed number of steps."""
        found = self.sampling, self.gradient_steps, self.segments, self.solver, self.loss
        return found != ("fixed", 0, 1, "none", "final")

    @property
    def exits(self) -> bool:
        """Whether tokens may stop before the last step at inference."""
        return self.exit != "fixed"

    def most(self, recursions: int) -> int:
        """Steps at most in training."""
        if self.sampling == "fixed":
            return recursions
        return self.sampling_most or recursions * (1 if self.sampling == "binomial" else 2)


DEFAULTS = {f.name: f.default for f in fields(RecursionConfig)}


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
        _check_routed(c, depth)
    if m.sharing == "none" or m.sharing.endswith("sequence"):
        raise ConfigError(
            f"config.recursion says how a whole core is applied again, but config.model.sharing = {m.sharing!r} has no "
            "such core. Use sharing = 'cycle' or 'middle_cycle'."
        )
    _check_reads(c, m)
    _check_nested(c, m, depth)
    _check_training(c, m, depth)
    _check_segments(c, m)
    _check_equilibrium(c, m)
    _check_exit(c, m, depth)


def _check_routed(c: RecursionConfig, depth: DepthConfig) -> None:
    """What a step reads goes with every policy; who recurses how often, and what training asks of
    the steps, is the policy's own."""
    of_depth = [
        name
        for name, default in DEFAULTS.items()
        if name.split("_")[0] in OF_TRAINING and getattr(c, name) != default
    ]
    if of_depth:
        raise ConfigError(
            f"{WHERE}.{of_depth[0]} = {getattr(c, of_depth[0])!r} goes with config.depth.policy = 'fixed': a routed token "
            f"has a depth and a loss of its own from policy {depth.policy!r}. Use one of the two."
        )
    if c.reads and not depth.halts and depth.executor == "gathered":
        raise ConfigError(
            f"{WHERE} says what a step reads, and the gathered executor, which takes single tokens out of their row, hands "
            f"it states alone. Under policy {depth.policy!r} set config.depth.executor = 'masked'."
        )


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
    for name, least in (
        ("inner", 0),
        ("gradient_steps", 0),
        ("segments", 1),
        ("adjoint_steps", 0),
        ("sampling_most", 0),
        ("exit_least", 1),
    ):
        if getattr(c, name) < least:
            raise ConfigError(f"{WHERE}.{name} must be at least {least}, got {getattr(c, name)}.")

    given = next((n for n in ("adjoint", "adjoint_steps") if getattr(c, n) != DEFAULTS[n]), "")
    if given and c.solver == "none":
        raise ConfigError(
            f"{WHERE}.{given} = {getattr(c, given)!r} is of the gradient at a fixed point, but solver = 'none' runs to none. "
            "Set solver = 'picard' or 'anderson', or leave it."
        )


def _check_reads(c: RecursionConfig, m: ModelConfig) -> None:
    if c.state != "embed" and c.injection == "none":
        raise ConfigError(
            f"{WHERE}.state = {c.state!r} with injection = 'none': no step would ever see the input. Set injection, or "
            "use state = 'embed'."
        )


def _check_nested(c: RecursionConfig, m: ModelConfig, depth: DepthConfig) -> None:
    if not c.inner:
        return
    inner = f"{WHERE}.inner = {c.inner}"
    if m.recursions % (c.inner + 1):
        raise ConfigError(
            f"{inner} makes rounds of {c.inner} updates of z and one of y, but config.model.recursions = {m.recursions} "
            f"updates are no whole number of rounds. Use a multiple of {c.inner + 1}."
        )
    if m.networks > 2:
        raise ConfigError(
            f"{inner} has two states, and config.model.networks = {m.networks} is more than one network for each. Use 1 "
            "(TRM) or 2 (HRM)."
        )
    if depth.routed:
        raise ConfigError(
            f"{inner} carries two states from step to step, and policy {depth.policy!r} scores one. Use "
            "config.depth.policy = 'fixed'."
        )
    if depth.kv_name != "full":
        raise ConfigError(
            f"{inner} with config.depth.kv = {depth.kv_name!r}: the updates of the two states make keys of their own. Use "
            "kv = 'full'."
        )
    if c.exits:
        raise ConfigError(
            f"{inner} with {WHERE}.exit = {c.exit!r}: a rule that compares states after each step would compare an update "
            "of z with one of y. Use exit = 'fixed'."
        )
    if c.sampling != "fixed":
        raise ConfigError(
            f"{inner} with {WHERE}.sampling = {c.sampling!r}: a drawn number of steps would end within a round. Use "
            "sampling = 'fixed'."
        )
    if c.loss != "final" and c.segments == 1:
        raise ConfigError(
            f"{inner} with {WHERE}.loss = {c.loss!r}: after an update of z there is no new answer to have a loss. Set "
            "segments, whose ends are ends of rounds, or loss = 'final'."
        )


def _check_segments(c: RecursionConfig, m: ModelConfig) -> None:
    if c.segments == 1:
        return
    segments, calls = f"{WHERE}.segments = {c.segments}", m.recursions // c.segments
    if m.recursions % c.segments or calls % (c.inner + 1):
        raise ConfigError(
            f"{segments} cuts config.model.recursions = {m.recursions} into equal parts of whole rounds ({c.inner + 1} "
            f"steps). Use a multiple of {c.segments * (c.inner + 1)} recursions."
        )
    if c.loss in ("final", "gate"):
        raise ConfigError(
            f"{segments} with {WHERE}.loss = {c.loss!r}: no gradient crosses between segments, so each needs a loss of its "
            "own with a given weight. Use loss = 'uniform', 'power' or 'decay'."
        )
    if c.sampling != "fixed":
        raise ConfigError(
            f"{segments} with {WHERE}.sampling = {c.sampling!r}: segments are equal parts of a fixed number of steps. Use "
            "one of the two."
        )
    if c.injection == "none":
        raise ConfigError(
            f"{segments} with injection = 'none': embedding and prelude would get no gradient after the first segment. "
            "Set injection."
        )
    if c.gradient_steps > calls:
        raise ConfigError(
            f"{WHERE}.gradient_steps = {c.gradient_steps} is more than a segment has, {calls} steps; no gradient crosses "
            "its start."
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


def _check_equilibrium(c: RecursionConfig, m: ModelConfig) -> None:
    solver = f"{WHERE}.solver = {c.solver!r}"
    if c.solver == "none":
        return
    if c.conditioning != "none":
        raise ConfigError(
            f"{solver} with conditioning = {c.conditioning!r}: a step that knows its number is another map each time, and "
            "has no fixed point. Use conditioning = 'none'."
        )
    if m.relaxed or m.networks > 1 or c.inner:
        own = (
            "inner" if c.inner else "config.model's lora_rank, norms = 'own', encoding or networks"
        )
        raise ConfigError(
            f"{solver} with {own}: steps would be different maps, which have no fixed point together. Leave it out."
        )
    if c.injection == "none":
        raise ConfigError(
            f"{solver} with injection = 'none': the fixed point would not depend on the input. Set injection."
        )
    if c.loss != "final":
        raise ConfigError(
            f"{solver} with loss = {c.loss!r}: of the way to a fixed point nothing is kept. Use loss = 'final'."
        )
    if c.sampling != "fixed" or c.gradient_steps or c.segments > 1:
        other = "sampling" if c.sampling != "fixed" else "segments" if c.segments > 1 else ""
        raise ConfigError(
            f"{solver} runs as many steps as it needs and has a gradient of its own, so {WHERE}."
            f"{other or 'gradient_steps'} means nothing. Leave it at its default."
        )
    if m.norm_placement in ("pre", "sandwich_in") and c.injection != "diagonal":
        raise ConfigError(
            f"{solver} with config.model.norm_placement = {m.norm_placement!r}: a step that adds to its state has a "
            "derivative of 1 and more, and never comes to rest. Use norm_placement = 'post' or 'sandwich_out', or "
            "injection = 'diagonal'."
        )
    if c.adjoint == "anderson" and not c.adjoint_steps:
        raise ConfigError(
            f"{WHERE}.adjoint = 'anderson' with adjoint_steps = 0 solves nothing. Give the steps it may take."
        )
    if not 0 < c.tolerance < 1:
        raise ConfigError(
            f"{WHERE}.tolerance is a relative residual, between 0 and 1; got {c.tolerance}."
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
