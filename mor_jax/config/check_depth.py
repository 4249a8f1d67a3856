"""Which policies of depth, routers and KV strategies go together, and with which network."""

from __future__ import annotations

import math

from mor_jax.config.fields import (
    EXECUTORS,
    GATES,
    GATES_OF_POLICY,
    INFERENCE,
    KV_OF_POLICY,
    KV_STRATEGIES,
    POLICIES,
    ROUTERS,
    SCORES,
    SCORES_OF_POLICY,
    WITH_CAPACITIES,
    WITH_ROUTER,
    DepthConfig,
    ModelConfig,
)
from mor_jax.config.refusals import one_of, positive
from mor_jax.errors import ConfigError


def check_depth(m: ModelConfig, d: DepthConfig) -> None:
    where = "config.depth"
    one_of(f"{where}.policy", d.policy, POLICIES)
    one_of(f"{where}.executor", d.executor, EXECUTORS)
    _check_kv(m, d)
    one_of(f"{where}.router", d.router, ROUTERS)
    for name, value, of_policy in (("score", d.score, SCORES_OF_POLICY), ("gate", d.gate, GATES_OF_POLICY)):
        if value:
            one_of(f"{where}.{name}", value, SCORES if name == "score" else GATES)
            fits = of_policy[d.policy]
            if value not in fits:
                valid = " or ".join(map(repr, fits)) or "leave it empty (nothing is routed)"
                raise ConfigError(f"{where}.{name} = {value!r} does not go with policy {d.policy!r}: {valid}.")
    positive(where, temperature=d.temperature)
    for name in ("alpha", "aux_loss_weight", "balance_loss_weight", "z_loss_weight", "bias_rate"):
        if not (getattr(d, name) >= 0 and math.isfinite(getattr(d, name))):
            raise ConfigError(f"{where}.{name} must be a number and not negative, got {getattr(d, name)}.")
    if d.policy not in WITH_ROUTER:
        for name, value, none in (("router", d.router, "linear"), ("z_loss_weight", d.z_loss_weight, 0.0)):
            if value != none:
                raise ConfigError(
                    f"{where}.{name} = {value!r} is of a router, but policy {d.policy!r} has none. Remove it, or use "
                    "policy 'expert_choice' or 'token_choice'."
                )
    for name in ("buckets", "warmup_stages", "vary_depths", "tile"):
        if getattr(d, name) < 1:
            raise ConfigError(f"{where}.{name} must be at least 1, got {getattr(d, name)}.")
    if d.warmup < 0:
        raise ConfigError(f"{where}.warmup counts optimiser steps and must not be negative, got {d.warmup}.")
    if d.warmup and d.policy == "fixed":
        raise ConfigError(
            f"{where}.warmup = {d.warmup} lets depth come down to what is routed, but policy 'fixed' routes nothing. "
            "Remove it, or choose another policy."
        )
    if not 0 <= d.vary <= 1:
        raise ConfigError(f"{where}.vary is a share of the steps and must be in [0, 1], got {d.vary}.")
    if d.vary and d.policy == "fixed":
        raise ConfigError(
            f"{where}.vary = {d.vary} varies what is routed, but policy 'fixed' routes nothing. Remove it."
        )
    if d.vary and d.vary_depths < 2:
        raise ConfigError(f"{where}.vary_depths = {d.vary_depths} is one depth, 1; give at least 2.")
    if d.tile > m.context:
        raise ConfigError(f"{where}.tile = {d.tile} is more than a row, config.model.context = {m.context} tokens.")
    one_of(f"{where}.inference", d.inference, INFERENCE)
    positive(where, aux_lr=d.aux_lr)
    if d.inference != "threshold" and d.policy != "expert_choice":
        raise ConfigError(
            f"{where}.inference = {d.inference!r} stands in for a top-k choice that sees the future; policy {d.policy!r} "
            "decides in training as at inference. Remove it, or use policy 'expert_choice'."
        )
    if d.inference == "auxiliary" and not d.aux_loss_weight:
        raise ConfigError(
            f"{where}.inference = 'auxiliary' goes by a router that only the auxiliary loss teaches, but "
            f"{where}.aux_loss_weight = 0. Set it, or use inference = 'calibrated'."
        )
    if d.bias_rate and d.policy != "token_choice":
        raise ConfigError(
            f"{where}.bias_rate = {d.bias_rate} balances depths that tokens choose; under policy {d.policy!r} capacities "
            "do. Remove it, or use policy 'token_choice'."
        )
    if d.policy != "fixed" and m.sharing.endswith("sequence"):
        raise ConfigError(
            f"{where}.policy = {d.policy!r} routes tokens between repetitions of the whole core, but "
            f"config.model.sharing = {m.sharing!r} repeats each block in place. Use cycle or middle_cycle."
        )
    if not 0 < d.threshold < 1:
        raise ConfigError(
            f"{where}.threshold must be between 0 and 1 (it is compared with a sigmoid), got {d.threshold}."
        )
    if d.capacities:
        if d.policy not in WITH_CAPACITIES:
            why = "sends every token through every recursion" if d.policy == "fixed" else "lets each token choose"
            raise ConfigError(
                f"{where}.capacities is set, but policy {d.policy!r} {why}. Use policy 'expert_choice' or 'random', or remove it."
            )
        if len(d.capacities) != m.recursions:
            raise ConfigError(f"{where}.capacities has {len(d.capacities)} entries for recursions = {m.recursions}.")
        if not all(0 < c <= 1 for c in d.capacities):
            raise ConfigError(f"{where}.capacities must lie in (0, 1], got {d.capacities}.")
        if any(b > a for a, b in zip(d.capacities, d.capacities[1:], strict=False)):
            raise ConfigError(
                f"{where}.capacities must not increase (a dropped token never re-enters), got {d.capacities}."
            )


def _check_kv(m: ModelConfig, d: DepthConfig) -> None:
    where = f"config.depth.kv = {d.kv!r}"
    if not d.kv:
        return
    one_of("config.depth.kv", d.kv, KV_STRATEGIES)
    fits = KV_OF_POLICY[d.policy]
    if d.kv not in fits:
        why = (
            "a token that stops early has no keys at deeper recursions"
            if d.kv == "full"
            else "every token runs every recursion"
        )
        raise ConfigError(f"{where} does not go with policy {d.policy!r} ({why}). Use {' or '.join(map(repr, fits))}.")
    if d.kv not in ("shared", "hybrid"):
        return
    if m.sharing == "none":
        raise ConfigError(
            f"{where} uses keys of the first recursion again, but config.model.sharing = 'none' has one recursion. "
            "Remove it, or choose sharing = 'middle_cycle' or 'cycle'."
        )
    if m.sharing.endswith("sequence"):
        raise ConfigError(
            f"{where} uses keys of the first run through the whole core again, but config.model.sharing = "
            f"{m.sharing!r} repeats each block in place. Use cycle or middle_cycle, or kv = 'full'."
        )
    if d.policy in WITH_CAPACITIES and d.capacities and d.capacities[0] < 1:
        raise ConfigError(
            f"{where} needs the keys of all tokens from recursion 1, but config.depth.capacities starts at "
            f"{d.capacities[0]}: the others would have none. Start it at 1.0, or use kv = 'recursion_wise'."
        )
