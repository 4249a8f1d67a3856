"""What recursions over a shared core get of their own when the core is made from unshared layers.

Each recursion stands for one layer of the source. "svd" gives it that layer's norms, if norms are a
recursion's own, and the best low-rank addition to the shared query and value projections: the
truncated singular value decomposition of the difference, its root on either side (Relaxed Recursive
Transformers, arXiv 2410.20672). At full rank the projection is the layer's own. "zero" gives every
recursion the shared norms and leaves the additions to their initialisation, zero.
"""

from __future__ import annotations

import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.errors import ConfigError
from mor_jax.nn.parameters import Tree

RELAXATIONS = ("zero", "svd")


def check_relaxation(from_model: ModelConfig, to_model: ModelConfig, relaxation: str) -> None:
    """Raise ConfigError unless the target can be relaxed this way."""
    if relaxation not in RELAXATIONS:
        raise ConfigError(
            f"there is no relaxation {relaxation!r}; choose one of {', '.join(RELAXATIONS)}."
        )
    if relaxation == "zero":
        return
    if not (to_model.lora_rank or to_model.norms == "own"):
        raise ConfigError(
            "relaxation 'svd' fills config.model.lora_rank and config.model.norms = 'own', but neither is set. Set one, "
            "or use 'zero'."
        )
    if from_model.layers != to_model.layers:
        raise ConfigError(
            f"relaxation 'svd' makes each recursion of the layer it stands for, so the source needs as many layers as the "
            f"target unrolls to: {from_model.layers} there, {to_model.layers} here. Use such a target, or 'zero'."
        )


def relaxed(shared: Tree, theirs: list[Tree] | None, model: ModelConfig) -> Tree:
    """A shared block with what its recursions have of their own; `theirs`: the layer of each (None:
    "zero")."""
    own, kept = {}, dict(shared)
    if model.norms == "own":
        for name in ("norm_1", "norm_2"):
            sources = theirs or [shared] * model.recursions
            own[name] = {"scale": np.stack([np.asarray(layer[name]["scale"]) for layer in sources])}
            del kept[name]
    if model.lora_rank and theirs:
        own["lora"] = additions(shared, theirs, model)
    return kept | ({"own": own} if own else {})


def additions(shared: Tree, theirs: list[Tree], model: ModelConfig) -> dict[str, np.ndarray]:
    """Leaves [R, ...] as of `nn.Lora`: of each recursion the nearest of its rank to its own layer
    less the shared one."""
    heads, kv_heads, _ = model.dims
    groups = heads // kv_heads
    # of the fused [K, G + 2, H, D]
    cut: dict[str, tuple[slice | int, ...]] = {
        "query": np.s_[:, :groups],
        "value": np.s_[:, groups + 1],
    }
    found: dict[str, list[np.ndarray]] = {
        f"{name}_{side}": [] for name in cut for side in ("down", "up")
    }
    tied = np.asarray(shared["attention"]["qkv"], np.float64)
    for layer in theirs:
        rest = np.asarray(layer["attention"]["qkv"], np.float64) - tied
        for name, where in cut.items():
            part = rest[where]
            u, s, v = np.linalg.svd(part.reshape(-1, model.width), full_matrices=False)
            rank = min(model.lora_rank, len(s))
            root, pad = np.sqrt(s[:rank]), model.lora_rank - rank
            found[f"{name}_down"].append(np.pad(root[:, None] * v[:rank], ((0, pad), (0, 0))))
            up = np.pad(u[:, :rank] * root, ((0, 0), (0, pad)))
            found[f"{name}_up"].append(up.reshape(*part.shape[:-1], model.lora_rank))
    return {name: np.stack(leaves).astype(np.float32) for name, leaves in found.items()}
