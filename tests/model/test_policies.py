"""Every depth policy there is, with every KV strategy it knows; and that nothing outside its file
knows its name."""

import ast
import functools
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from policies import (
    HOLDS,
    holds_in_causality,
    holds_in_configurations,
    holds_in_decoding,
    holds_in_executors,
)

from mor_jax.config import DepthConfig, depth_policies, from_config_dict
from mor_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
POLICIES = tuple(depth_policies())


@pytest.mark.parametrize("holds", HOLDS, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy, holds):
    holds(DepthConfig(policy))


@pytest.mark.parametrize(
    "holds", [holds_in_executors, holds_in_decoding], ids=lambda holds: holds.__name__
)
@pytest.mark.parametrize(
    ("policy", "kv"), [(p, kv) for p in POLICIES for kv in depth_policies()[p].kv_strategies[1:]]
)
def test_every_strategy_of_every_policy(policy, kv, holds):
    holds(DepthConfig(policy, kv=kv))


# ---------------------------------------------------------------- a policy is one file


def sources(*folders):
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            if "model/depth" not in path.as_posix():
                yield path, path.read_text(encoding="utf-8")


def test_no_policy_is_told_by_its_name_outside_its_room():
    """Who needs to know asks the policy or its configuration (`routed`, `at_once`, ...)."""
    compared = re.compile(r"depth\.policy\s*(==|!=|in\b|not in\b)|\bpolicy\s*(==|!=)\s*[\"']")
    asked = re.compile(
        r"isinstance\([^)]*\b(Fixed|ExpertChoice|TokenChoice|RandomChoice|EveryKth)(Config)?\)"
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path, text in sources("mor_jax", "rlm_runtime", "launch", "benchmarks")
        for line in text.splitlines()
        if compared.search(line) or asked.search(line)
    ]
    assert not found


def test_the_configuration_learns_of_policies_when_it_is_asked():
    """`mor_jax.config` imports no room above it; it looks for policies by the name of their
    package, in one place."""
    code = "import sys, mor_jax.config; print([m for m in sys.modules if m.startswith(('mor_jax.model', 'jax'))])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
    named = [
        path.relative_to(ROOT).as_posix()
        for path, text in sources("mor_jax")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and node.value == "mor_jax.model.depth"
    ]
    assert named == ["mor_jax/config/depth.py"]


@pytest.mark.parametrize(
    "first", ["mor_jax.config", "mor_jax.model.depth.every_kth", "mor_jax.model.lm"]
)
def test_policies_are_found_whatever_is_imported_first(first):
    code = f"import {first}; from mor_jax.config import depth_policies as p; print(*p())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert set(done.stdout.split()) == set(POLICIES)


# ---------------------------------------------------------------- one flat group of fields


MODEL = {"layers": 6, "recursions": 3, "sharing": "cycle"}
build = functools.partial(
    lambda **depth: from_config_dict({"model": MODEL, "depth": depth, "train": {"steps": 9}})
)


@pytest.mark.parametrize(
    ("depth", "parts"),
    [
        (
            {"policy": "every_kth", "everry": 3},
            ["config.depth.everry does not exist", "Did you mean config.depth.every"],
        ),
        (
            {"policy": "every_kth", "threshold": 0.7},
            ["config.depth.threshold = 0.7 is of policy 'expert_choice'"],
        ),
        (
            {"policy": "token_choice", "every": 3},
            ["config.depth.every = 3 is of policy 'every_kth'", "balance_loss_weight"],
        ),
        ({"policy": "fixed", "shallow": 2}, ["every recursion", "leave it at its default, 1"]),
        (
            {"policy": "every_kth", "router": "mlp"},
            ["'expert_choice' or 'token_choice'", "sets the depth of a token by"],
        ),
        ({"policy": "every_kth", "warmup": 3}, ["config.depth.warmup = 3", "no stages"]),
        (
            {"policy": "every-kth"},
            ["config.depth.policy must be one of", "Did you mean 'every_kth'"],
        ),
        ({"policy": "every_kth", "every": 0}, ["config.depth.every = 0 must be from 1"]),
        ({"policy": "every_kth", "shallow": 4}, ["config.depth.shallow = 4", "recursions = 3"]),
    ],
)
def test_fields_that_do_not_fit_are_named(depth, parts):
    with pytest.raises(ConfigError) as error:
        build(**depth)
    for part in parts:
        assert part in str(error.value)


def test_defaults_of_other_policies_are_no_contradiction():
    """A stored configuration, or a file whose every field can be overridden, holds the fields of
    all policies."""
    from configs.arguments import complete

    raw = complete(
        {"model": MODEL, "depth": {"policy": "every_kth", "every": 5}, "train": {"steps": 9}}
    ).to_dict()
    assert raw["depth"]["threshold"] == 0.5 and raw["depth"]["every"] == 5
    assert from_config_dict(raw).depth == DepthConfig("every_kth", every=5)


def test_two_policies_cannot_have_one_name_nor_one_class_two():
    import dataclasses

    from mor_jax.model.depth import PolicyConfig

    with pytest.raises(TypeError, match="two depth policies are called 'fixed'"):
        type("Other", (PolicyConfig,), {"policy": "fixed"})
    with pytest.raises(ConfigError, match="DepthConfig\\('fixed'"):
        dataclasses.replace(DepthConfig("every_kth"), policy="fixed")


# ---------------------------------------------------------------- the recipe


def test_the_recipe_makes_a_policy(monkeypatch):
    """The file printed in CONTRIBUTING.md is a whole policy: named in a configuration, it does all
    that is asked of one."""
    from mor_jax.config import depth

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(depth, "_REGISTERED", dict(depth_policies()))
    module = types.ModuleType("first_tokens")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, "first_tokens.py", "exec"), module.__dict__)
    assert set(depth_policies()) == {*POLICIES, "first_tokens"}
    made = build(policy="first_tokens", first=3).depth
    assert made == DepthConfig("first_tokens", first=3) and isinstance(
        made, module.FirstTokensConfig
    )
    with pytest.raises(ConfigError, match=r"config\.depth\.first = 3 is of policy 'first_tokens'"):
        build(policy="fixed", first=3)
    for holds in (
        holds_in_configurations,
        holds_in_executors,
        holds_in_decoding,
        holds_in_causality,
    ):
        holds(made)
