"""Models that no published architecture computes, as a directory that transformers reads with
`trust_remote_code`: shared blocks once, routers, and the PyTorch code of `remote/` beside them.

`config.json` has this project's own fields under "model" and "depth", so `config_from` reads back
what `config_with_code` wrote. Tensors are named as those of a Llama where they are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from mor_jax.config import (
    Config,
    DepthConfig,
    ModelConfig,
    depth_policies,
    from_dict,
    unshared_ends,
)
from mor_jax.config.check_model import check_model
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.model.lm import LM
from mor_jax.paths import write_text
from mor_jax.weights.families import Place, block_places, table_places

ARCHITECTURE = "MorForCausalLM"
FILES = ("configuration_mor.py", "modeling_mor.py")
DERIVED = ".router.thresholds"  # follows from the survey
# Fields of a policy's configuration by which its arithmetic goes, with their defaults filled in.
RESOLVED = {"kv": "kv_name", "score": "score_name", "gate": "gate_name", "alpha": "gate_scale"}


def config_with_code(config: Config) -> dict[str, object]:
    """The `config.json` of such a model.

    Raises CheckpointError: the code beside the weights does not compute it."""
    m, depth = config.model, config.depth
    if not depth.exported:
        able = (name for name, policy in depth_policies().items() if policy.exported)
        raise CheckpointError(
            f"depth.policy = {depth.policy!r} cannot be written for other tools; those that can: {', '.join(able)}."
        )
    if config.recursion.reads or config.recursion.exits or m.networks > 1 or m.bidirectional:
        raise CheckpointError(
            "a model whose steps have knobs of config.recursion (state, injection, conditioning, loop_norm, inner, exit), or "
            "with model.networks or model.bidirectional, cannot be written for other tools yet."
        )
    prelude, coda = unshared_ends(m)
    model = dataclasses.replace(m, prelude=prelude, coda=coda, head_dim=m.dims[2])
    of_depth = dataclasses.asdict(depth)
    of_depth |= {
        name: getattr(depth, of)
        for name, of in RESOLVED.items()
        if name in of_depth and hasattr(depth, of)
    }
    files = {"AutoConfig": "configuration_mor.MorConfig"} | {
        auto: f"modeling_mor.{ARCHITECTURE}" for auto in ("AutoModel", "AutoModelForCausalLM")
    }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "mor",
        "auto_map": files,
        "tie_word_embeddings": m.tied,
        "torch_dtype": "float32",
        "model": dataclasses.asdict(model),
        "depth": of_depth,
    }


def config_from(config: Mapping[str, Any], where: str) -> tuple[ModelConfig, DepthConfig]:
    """What `config_with_code` wrote. Raises CheckpointError: it cannot be read."""
    try:
        read = from_dict({"model": config["model"], "depth": config["depth"]})
        check_model(read.model)
    except (ConfigError, KeyError, TypeError) as e:
        raise CheckpointError(f"{where}: not a model that this version can read ({e}).") from e
    return read.model, read.depth


def places_with_code(config: Config) -> dict[str, Place]:
    """Every tensor by name; leaves of the model that belong to training alone are left out."""
    m, lm = config.model, LM.from_config(config)
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    found = table_places(m)
    if m.smear:
        found["model.smear"] = Place((m.smear, m.width), ("embed", "smear"), ...)
    for part in ("prelude", "core", "coda"):
        for i, leaves in shapes[part].items():
            of_block = block_places(m, (part, i))
            own = leaves.get("own", {})
            for name in ("norm_1", "norm_2"):
                if name not in leaves:
                    of_block = {n: p for n, p in of_block.items() if name not in p.leaf}
            found |= {f"model.{part}.{i}.{name}": place for name, place in of_block.items()}
            found |= {
                f"model.{part}.{i}.own.{name}": _whole((part, i, "own", *leaf), shape)
                for name, leaf, shape in _own(own, m)
            }
            for name in ("after_1", "after_2", "branch_1", "branch_2"):
                if name in leaves:
                    found[f"model.{part}.{i}.{name}.weight"] = _whole(
                        (part, i, name, "scale"), (m.width,)
                    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["router"]):
        keys = [key.key for key in path]
        # the network of a router, under one name whatever the policy
        name = ["scorer", *keys[-1:]] if keys[-1] in ("kernel", "hidden") else keys
        name = keys if keys[0] == "auxiliary" else name
        found[f"model.router.{'.'.join(name)}"] = _whole(("router", *keys), leaf.shape)
    return found


def _own(
    own: Mapping[str, Any], m: ModelConfig
) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(name, path, shape) of what each recursion has of its own in a block."""
    names = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    found: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
        (names.get(name, name), (name, "scale"), leaves["scale"].shape)
        for name, leaves in own.items()
        if name != "lora"
    ]
    for name, leaf in own.get("lora", {}).items():
        steps, rank = m.recursions, m.lora_rank
        shape = (steps, rank, m.width) if name.endswith("down") else (steps, -1, rank)
        size = int(np.prod(leaf.shape)) // (steps * rank)
        found.append((name, ("lora", name), tuple(size if n == -1 else n for n in shape)))
    return found


def _whole(leaf: tuple[str, ...], shape: tuple[int, ...]) -> Place:
    return Place(tuple(shape), leaf, ...)


def derived_tensors(config: Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors beside the weights that the code reads: thresholds of calibrated routers."""
    derived = LM.from_config(config).policy.derived(params["router"])
    return {f"model.router.{name}": np.asarray(leaf, np.float32) for name, leaf in derived.items()}


def write_code(directory: epath.Path) -> None:
    """Copy the code beside the weights."""
    for name in FILES:
        text = (Path(__file__).parent / "remote" / name).read_text(encoding="utf-8")
        write_text(directory / name, text)
