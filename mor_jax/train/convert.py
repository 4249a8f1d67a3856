"""A checkpoint becomes step 0 of a recursive run."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, NamedTuple

import jax
from etils import epath

from mor_jax.analysis.accounting import training_steps
from mor_jax.config import AdapterConfig, Config, check
from mor_jax.data.chat import ChatTemplate
from mor_jax.data.prepare import prepare
from mor_jax.errors import CheckpointError, UserError
from mor_jax.model.convert import check_fit, convert, default_method, overlay, source_table
from mor_jax.model.lm import LM
from mor_jax.model.relax import check_relaxation
from mor_jax.parallel.mesh import make_mesh
from mor_jax.paths import as_path, steps_in
from mor_jax.train.checkpoint import Checkpointer, save_weights
from mor_jax.train.load import load_model
from mor_jax.train.lock import hold
from mor_jax.train.loop import resolve
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import create_state
from mor_jax.train.workdir import claim, write_json


class Converted(NamedTuple):
    """What was written."""

    config: Config
    source_step: int
    method: str
    # source layers of each block, see `model.convert.source_table`
    table: dict[str, tuple[tuple[int, ...], ...]]


def convert_checkpoint(
    source: str | os.PathLike[str],
    cfg: Config,
    workdir: str | os.PathLike[str],
    method: str = "",
    *,
    step: int | None = None,
    seed: int = 0,
    relaxation: str = "zero",
    average: bool = False,
    progress: bool = True,
) -> Converted:
    """Write a run directory whose checkpoint of step 0 is the model of `cfg` made of the weights of
    `source`.

    The optimiser, the schedule and the routers start fresh; `train.loop.train` on the same
    configuration and directory goes on from it. The corpus of `cfg` is prepared here, so that the
    checkpoint carries its fingerprint; it may be another than the source's, but must be cut by the
    source's tokenizer.

    Args:
      cfg: checked configuration of the target; a `vocab_size` of 0 is the source's.
      method: one of `model.convert.METHODS`; "": `keep` from a source that shares blocks, else
        `stepwise`.
      step: checkpoint of the source, the newest by default.
      seed: of the method `random`.
      relaxation: zero | svd, see `model.relax`.
      average: take the running mean of the source's weights.
    Raises:
      ConfigError: the shapes do not fit, or there are too few source layers.
      CheckpointError: the source cannot be read, its tokenizer is another one, or `workdir` holds a
        run already.
    """
    workdir = as_path(workdir)
    if (workdir / "config.json").exists() or steps_in(workdir / "checkpoints"):
        raise CheckpointError(f"{workdir} already holds a run; give another --workdir.")
    mesh = make_mesh(cfg.mesh)
    loaded = load_model(source, step, mesh=mesh, average=average)
    old = loaded.lm.model
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or old.vocab_size)
    )
    method = method or default_method(old)
    check_fit(old, cfg.model)
    check_relaxation(old, cfg.model, relaxation)
    # before the corpus is prepared: a mistake costs no time
    table = source_table(old, cfg.model, method, seed=seed)
    with jax.set_mesh(mesh), hold(workdir):
        data = prepare(cfg.data, cfg.model.context, progress=progress)
        if data.tokenizer.fingerprint() != loaded.tokenizer.fingerprint():
            raise CheckpointError(
                f"config.data.tokenizer = {cfg.data.tokenizer!r} gives another tokenizer than the one {source} was trained "
                f"with. Use its own: --config.data.tokenizer={_tokenizer_file(source)}."
            )
        cfg = resolve(cfg, data)
        check(cfg, devices=mesh.size)
        lm, tx = LM.from_config(cfg), optimizer_of(cfg, training_steps(cfg))
        state = create_state(lm, tx, mesh, cfg.train.seed, bool(cfg.optim.ema))
        made = convert(loaded.params, old, cfg.model, method, seed=seed, relaxation=relaxation)
        params = _placed(overlay(state.params, made), lm, mesh)
        chat = data.template.source if data.template is not None else loaded.chat_template
        meta = {
            "config": cfg.to_dict(),
            "tokenizer": data.tokenizer.to_json(),
            "data": data.fingerprint,
            "step": 0,
            **({} if chat is None else {"chat_template": chat}),
            "converted": {
                "source": os.fspath(source),
                "step": loaded.step,
                "method": method,
                "seed": seed,
                "relaxation": relaxation,
            },
        }
        # The configuration last: a directory left half-made must not look like a run that starts
        # from nothing.
        with Checkpointer(workdir / "checkpoints", keep=cfg.train.keep_checkpoints) as checkpoints:
            checkpoints.save(0, state.starting_from(params), meta)
        data.tokenizer.save(workdir)
        if chat is not None:
            ChatTemplate(chat).save(workdir)
        claim(workdir, cfg, data)
    return Converted(cfg, loaded.step, method, table)


def merge_checkpoint(
    source: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    average: bool = False,
) -> int:
    """Write a run directory with the weights of `source` alone, its adapters (`config.adapter`)
    merged; returns the step.

    Every command reads it but `launch.train`, which takes it as --init_from.

    Args:
      step: checkpoint of the source, the newest by default.
      average: the running mean of its weights.
    Raises:
      CheckpointError: the source cannot be read, or `workdir` holds a run already.
    """
    workdir = as_path(workdir)
    if (workdir / "config.json").exists() or steps_in(workdir / "checkpoints"):
        raise CheckpointError(f"{workdir} already holds a run; give another --workdir.")
    loaded = load_model(source, step, average=average)
    old = loaded.config
    cfg = dataclasses.replace(
        old, adapter=AdapterConfig(), optim=dataclasses.replace(old.optim, ema=0.0)
    )
    meta = {"config": cfg.to_dict(), "tokenizer": loaded.tokenizer.to_json(), "data": loaded.data}
    meta |= {} if loaded.chat_template is None else {"chat_template": loaded.chat_template}
    came = {"parent": os.fspath(source), "step": loaded.step, "data": loaded.data}
    meta["lineage"] = came | ({"before": loaded.lineage} if loaded.lineage else {})
    with hold(workdir):
        save_weights(workdir / "checkpoints", loaded.params, meta)
        loaded.tokenizer.save(workdir)
        if loaded.chat_template is not None:
            loaded.template.save(workdir)
        write_json(workdir / "config.json", cfg.to_dict())
    return loaded.step


def _placed(params: dict[str, Any], lm: LM, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """All arrays where the target's lie."""
    return jax.device_put(params, lm.rules.shardings(mesh, lm.logical_axes()))


def _tokenizer_file(source: str | os.PathLike[str]) -> epath.Path:
    path = as_path(source)
    for folder in (path, path.parent):
        if (folder / "tokenizer.json").exists():
            return folder / "tokenizer.json"
    raise UserError(f"{source} has no tokenizer.json beside its checkpoints; copy it there.")
