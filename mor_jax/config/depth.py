"""The depth part of a configuration: the fields that every policy has, and how a policy's own are
found.

A policy lives in one file of `mor_jax/model/depth/`, which defines a frozen dataclass derived from
`DepthConfig` with the policy's name as the default of `policy`, the policy's own fields, and their
check. Defining the class registers it. `depth_policies` finds them all: it imports that package by
name, when it is first asked. This is the one place where a room learns of a room above it, and it
does so at run time: importing `mor_jax.config` imports no policy.

In a configuration file all fields of depth stand side by side in one flat group. A field of another
policy than the chosen one is refused where it is set to anything but its default
(`refuse_other_policies`).
"""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mor_jax.config.fields import ModelConfig
from mor_jax.config.refusals import nearest, one_of
from mor_jax.errors import ConfigError

HOME = "mor_jax.model.depth"  # the package whose files are the policies
EXECUTORS = ("gathered", "masked")
KV_STRATEGIES = ("full", "recursion_wise", "shared", "hybrid", "hybrid_first")
# Under a routed policy a token that stopped at recursion r has no keys deeper than r, so "full"
# (every token stored at every depth) cannot exist.
ROUTED_KV = ("recursion_wise", "shared", "hybrid", "hybrid_first")

_REGISTERED: dict[str, type[DepthConfig]] = {}


@dataclass(frozen=True)
class DepthConfig:
    """How often each token recurses. `DepthConfig("token_choice", buckets=2)` makes the
    configuration class of the named policy, which adds fields of its own."""

    # name of a file's policy in model/depth/: fixed, expert_choice, token_choice, random, ...
    policy: str = "fixed"
    executor: str = "gathered"  # training: gathered (fast) | masked (oracle)
    # Whose keys a recursion step sees, in training and in decoding. fixed: full | shared; routed:
    # recursion_wise | shared (made once, at r = 1) | hybrid (renewed by the tokens that go on) |
    # hybrid_first (the released code's hybrid: of tokens that stopped, the keys of r = 1); "": the
    # policy's first.
    kv: str = ""
    # Optimiser steps of depth warm-up (model/depth/warmup.py); 0: none. Policies with capacities
    # let them fall from 1 to their target along a half cosine, in `warmup_stages` equal strides;
    # token_choice runs every token at full depth, balance suspended.
    warmup: int = 0
    warmup_stages: int = 4  # each is a program to compile
    # Share of the warm steps that train at another mean depth, `vary_depths` of them evenly from 1
    # to R; 0: none. A model that has seen other depths can be dialled to them
    # (model/depth/vary.py).
    vary: float = 0.0
    vary_depths: int = 5  # each is a program to compile
    # tokens; row sizes of recursion steps are rounded to multiples of it (128 or 256 suit an H100)
    tile: int = 1

    # What a policy says of itself, beside its fields.
    routed: ClassVar[bool] = True  # tokens may differ in depth
    # depths are known before the first step, by one rule in training and inference
    at_once: ClassVar[bool] = False
    # training fills static capacities, `capacities`, row by row
    has_capacities: ClassVar[bool] = False
    staged: ClassVar[bool] = False  # `warmup` and `vary` mean something
    # tokens stop by what their states say after a step: there is no gathered executor
    halts: ClassVar[bool] = False
    kv_strategies: ClassVar[tuple[str, ...]] = ROUTED_KV  # the first is the default
    exported: ClassVar[bool] = False  # the PyTorch code of `weights/remote` computes it
    does: ClassVar[str] = ""  # for messages: "lets each token choose its depth"

    def __new__(cls, policy: str = "fixed", *_: Any, **__: Any) -> DepthConfig:
        """`DepthConfig` itself makes an instance of the named policy's class."""
        return object.__new__(policy_class(policy) if cls is DepthConfig else cls)

    def __init_subclass__(cls) -> None:
        if "policy" not in vars(cls):  # a base of several policies
            return
        known = _REGISTERED.get(cls.policy)
        if known and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"two depth policies are called {cls.policy!r}: {known.__qualname__} and {cls.__qualname__}"
            )
        _REGISTERED[cls.policy] = cls

    def __post_init__(self) -> None:
        if self.policy != type(self).policy:
            raise ConfigError(
                f"config.depth.policy = {self.policy!r} has other fields than {type(self).policy!r}; make a new "
                f"DepthConfig({self.policy!r}, ...)."
            )

    @property
    def kv_name(self) -> str:
        """The KV strategy, the policy's default filled in."""
        return self.kv or self.kv_strategies[0]

    def shares(self, model: ModelConfig) -> tuple[float, ...]:
        """Share of a full row that runs recursion r = 1..R in training, once warm
        (`model/depth/warmup.py`)."""
        return (1.0,) * model.recursions

    def learning_rates(self) -> dict[str, float]:
        """Factor on the learning rate of groups of router parameters, by the name of their
        group."""
        return {}

    @classmethod
    def why_not(cls, field: str) -> str:
        """Why this policy has no use for a field of another one."""
        return cls.does

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError for the first value that cannot be run with this network. A policy
        extends it by its own fields."""
        where, policy = "config.depth", repr(self.policy)
        one_of(f"{where}.executor", self.executor, EXECUTORS)
        self._check_kv(model)
        for name in ("warmup_stages", "vary_depths", "tile"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{where}.{name} must be at least 1, got {getattr(self, name)}.")
        if self.warmup < 0:
            raise ConfigError(
                f"{where}.warmup counts optimiser steps and must not be negative, got {self.warmup}."
            )
        why = "has no stages of training" if self.routed else "routes nothing"
        if self.warmup and not self.staged:
            raise ConfigError(
                f"{where}.warmup = {self.warmup} lets depth come down to what is routed, but policy {policy} {why}. "
                "Remove it, or choose another policy."
            )
        if not 0 <= self.vary <= 1:
            raise ConfigError(
                f"{where}.vary is a share of the steps and must be in [0, 1], got {self.vary}."
            )
        if self.vary and not self.staged:
            raise ConfigError(
                f"{where}.vary = {self.vary} varies what is routed, but policy {policy} {why}. Remove it."
            )
        if self.vary and self.vary_depths < 2:
            raise ConfigError(
                f"{where}.vary_depths = {self.vary_depths} is one depth, 1; give at least 2."
            )
        if self.tile > model.context:
            raise ConfigError(
                f"{where}.tile = {self.tile} is more than a row, config.model.context = {model.context} tokens."
            )
        if self.routed and model.sharing.endswith("sequence"):
            raise ConfigError(
                f"{where}.policy = {policy} routes tokens between repetitions of the whole core, but "
                f"config.model.sharing = {model.sharing!r} repeats each block in place. Use cycle or middle_cycle."
            )

    def _check_kv(self, model: ModelConfig) -> None:
        if not self.kv:
            return
        where = f"config.depth.kv = {self.kv!r}"
        one_of("config.depth.kv", self.kv, KV_STRATEGIES)
        if self.kv not in self.kv_strategies:
            why = (
                "a token that stops early has no keys at deeper recursions"
                if self.kv == "full"
                else "every token runs every recursion"
            )
            fits = " or ".join(map(repr, self.kv_strategies))
            raise ConfigError(
                f"{where} does not go with policy {self.policy!r} ({why}). Use {fits}."
            )
        if self.kv not in ("shared", "hybrid", "hybrid_first"):
            return
        if model.sharing == "none":
            raise ConfigError(
                f"{where} uses keys of the first recursion again, but config.model.sharing = 'none' has one recursion. "
                "Remove it, or choose sharing = 'middle_cycle' or 'cycle'."
            )
        if model.sharing.endswith("sequence"):
            raise ConfigError(
                f"{where} uses keys of the first run through the whole core again, but config.model.sharing = "
                f"{model.sharing!r} repeats each block in place. Use cycle or middle_cycle, or kv = 'full'."
            )
        first = self.shares(model)[0]
        if first < 1:
            raise ConfigError(
                f"{where} needs the keys of all tokens from recursion 1, but config.depth.capacities starts at "
                f"{first}: the others would have none. Start it at 1.0, or use kv = 'recursion_wise'."
            )


def depth_policies() -> Mapping[str, type[DepthConfig]]:
    """The configuration class of every depth policy, by its name."""
    importlib.import_module(HOME)
    return types.MappingProxyType(_REGISTERED)


def policy_class(name: Any) -> type[DepthConfig]:
    """The configuration class of this policy. Raises ConfigError with the nearest name for one that
    does not exist."""
    found = depth_policies()
    if name not in found:
        one_of("config.depth.policy", name, tuple(found))
    return found[name]


def depth_hints() -> dict[str, Any]:
    """Name and type of every field of every policy, in one flat group."""
    found: dict[str, Any] = {}
    for cls in depth_policies().values():
        hints = typing.get_type_hints(cls)
        found |= {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return found


def depth_defaults() -> dict[str, Any]:
    """Every field of every policy with its default, in one flat group: what a configuration file
    can be overridden in."""
    found = {
        f.name: f.default for cls in depth_policies().values() for f in dataclasses.fields(cls)
    }
    return found | {"policy": DepthConfig.policy}


def field_names(cls: type[DepthConfig]) -> tuple[str, ...]:
    """Names of the fields of a policy's configuration."""
    return tuple(f.name for f in dataclasses.fields(cls))


def owners(field: str) -> tuple[str, ...]:
    """Names of the policies that have this field."""
    return tuple(name for name, cls in depth_policies().items() if field in field_names(cls))


def own_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of a flat group of depth fields, those that its policy has."""
    cls = policy_class(raw.get("policy", DepthConfig.policy))
    return {name: value for name, value in raw.items() if name in field_names(cls)}


def switched(raw: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A flat group of depth fields whose policy has been overridden: without what was set for
    another policy before.

    `given`: names of the fields that were overridden; they stay, to be refused if they do not
    fit."""
    if "policy" not in given:
        return dict(raw)
    own = own_fields(raw)
    return {name: value for name, value in raw.items() if name in own or name in given}


def refuse_other_policies(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError for a field of another policy that is set to anything but its default."""
    policy = raw.get("policy", DepthConfig.policy)
    cls, defaults = policy_class(policy), depth_defaults()
    for name, value in raw.items():
        default = defaults[name]
        value = tuple(value) if isinstance(default, tuple) else value
        if name in field_names(cls) or value == default:
            continue
        of = " or ".join(map(repr, owners(name)))
        own = [field for field in field_names(cls) if field not in field_names(DepthConfig)]
        near = nearest(name, own)
        raise ConfigError(
            f"config.depth.{name} = {value!r} is of policy {of}; policy {policy!r} has none: it {cls.why_not(name)}. "
            f"Use policy {of}, or leave it {'at its default, ' + repr(default) if default != '' else 'empty'}."
            + (f" Did you mean config.depth.{near}?" if near else "")
            + (f" Fields of {policy!r} alone: {', '.join(own)}." if own and not near else "")
        )
