"""Weights that a new run starts from: those of another run's checkpoint, whatever architecture it
has."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from mor_jax.config import Config
from mor_jax.data.vocabulary import Tokenizer
from mor_jax.errors import CheckpointError
from mor_jax.model.lm import LM
from mor_jax.train.load import Loaded, load_model

# Fields of `model` that may differ between the checkpoint and the run: how it is executed, how long
# its rows are, and how positions are scaled for longer ones.
FREE = frozenset({"context", "init_std", "dtype", "remat", "attention", "loss_chunk"})


def initial_params(
    path: str | os.PathLike[str],
    cfg: Config,
    tokenizer: Tokenizer,
    lm: LM,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters as `lm.init` would make them, lineage) from the newest checkpoint in `path`, or
    that of `step`.

    The optimiser, the schedule and the position in the data start fresh. `lineage` says where the
    weights came from: parent, step, data (fingerprint of its rows), and the parent's own lineage.

    Raises:
      CheckpointError: the checkpoint cannot be read, has another architecture or another tokenizer.
    """
    loaded = load_model(path, step, mesh=mesh)
    _check(loaded, path, cfg, tokenizer)
    placed = jax.device_put(loaded.params, lm.rules.shardings(mesh, lm.logical_axes()))
    lineage = {"parent": os.fspath(path), "step": loaded.step, "data": loaded.data}
    return placed, lineage | ({"before": loaded.lineage} if loaded.lineage else {})


def _free(name: str) -> bool:
    return name in FREE or name.startswith("rope_")


def _check(loaded: Loaded, path: str | os.PathLike[str], cfg: Config, tokenizer: Tokenizer) -> None:
    old, new = dataclasses.asdict(loaded.lm.model), dataclasses.asdict(cfg.model)
    differ = [name for name in old if old[name] != new[name] and not _free(name)]
    wrong = [f"model.{name} {old[name]!r} there, {new[name]!r} here" for name in differ]
    old_policy, new_policy = loaded.config.depth.policy, cfg.depth.policy
    if old_policy != new_policy:
        wrong.append(f"depth.policy {old_policy!r} there, {new_policy!r} here")
    shapes = jax.eval_shape(LM.from_config(cfg).init, jax.random.key(0))
    if not wrong and jax.tree.map(lambda x: x.shape, shapes) != jax.tree.map(
        lambda x: x.shape, loaded.params
    ):
        wrong.append("the routers have other shapes")
    if wrong:
        raise CheckpointError(
            f"--init_from={path}: its weights do not fit this configuration ({'; '.join(wrong)}). Use the same "
            "architecture, or launch.convert to make a recursive model of an unshared one."
        )
    if tokenizer.fingerprint() != loaded.tokenizer.fingerprint():
        raise CheckpointError(
            f"--init_from={path}: config.data.tokenizer = {cfg.data.tokenizer!r} gives another tokenizer than the one it "
            "was trained with. Use its own: the tokenizer.json in its run directory."
        )
