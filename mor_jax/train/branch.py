"""A new run that branches off another one's plateau and lets the learning rate fall: the same run,
brought to its end.

The branch begins with the whole state of the parent, optimiser and step included, so its directory
looks like a run that was stopped there. Its schedule is the parent's up to that step, then the
linear fall of "wsd".
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax

from mor_jax.analysis.accounting import training_steps
from mor_jax.config import Config, check, from_dict
from mor_jax.data.prepare import prepare
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.paths import as_path, steps_in
from mor_jax.train.checkpoint import Checkpointer, load_meta, restore_params
from mor_jax.train.load import checkpoint_directory
from mor_jax.train.lock import hold
from mor_jax.train.loop import resolve
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import TrainState, abstract_state
from mor_jax.train.workdir import claim, differences, kind_of


def anneal(
    cfg: Config,
    parent: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    steps: int,
    *,
    step: int | None = None,
    progress: bool = True,
) -> Config:
    """Make `workdir` a branch of `parent` and return its configuration, with which
    `train.loop.train` goes on.

    A branch that has begun already is left as it is. The data may be other than the parent's, of
    the same tokenizer; batch size, weights and optimiser are the parent's.

    Args:
      cfg: of the parent, but for what may differ; its steps and schedule are set here.
      steps: of the branch, over which the rate falls to `optim.final_lr`.
      step: the parent's checkpoint to branch off; the newest by default.
    Raises:
      ConfigError: the parent's rate is not constant at that step, or `cfg` differs in what the
        state depends on.
      CheckpointError: there is no such checkpoint, or it has another tokenizer.
    """
    workdir, directory = as_path(workdir), checkpoint_directory(parent)
    begun = bool(steps_in(workdir / "checkpoints"))
    if begun:
        came = load_meta(workdir / "checkpoints")[1].get("lineage") or {}
        if came.get("parent") != os.fspath(parent) or not came.get("annealed"):
            raise CheckpointError(
                f"{workdir} holds a run that is no branch of {parent}; give another --workdir."
            )
        step = came["step"]
    step, meta = load_meta(directory, step)
    old = from_dict(meta["config"])
    cfg = _annealed(cfg, old, step, steps)
    vocab_size = cfg.model.vocab_size or old.model.vocab_size
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
    if begun:
        return cfg
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh), hold(workdir):
        data = prepare(cfg.data, cfg.model.context, progress=progress)
        cfg = resolve(cfg, data)
        check(cfg, devices=mesh.size)
        if data.tokenizer.to_json() != meta["tokenizer"]:
            raise CheckpointError(
                f"config.data.tokenizer gives another tokenizer than {parent} was trained with."
            )
        _same_state(old, cfg, parent)
        lm, tx = LM.from_config(cfg), optimizer_of(cfg, training_steps(cfg))
        wanted = abstract_state(lm, tx, mesh, bool(cfg.optim.ema))

        def read(name: str, like: Any) -> Any:
            return None if like is None else restore_params(directory, like, step, entry=name)[0]

        state = TrainState(*(read(name, like) for name, like in wanted._asdict().items()))
        lineage = {
            "parent": os.fspath(parent),
            "step": step,
            "data": meta["data"],
            "annealed": steps,
        }
        lineage |= {"before": meta["lineage"]} if meta.get("lineage") else {}
        kept = {name: meta[name] for name in ("chat_template",) if name in meta}
        more = {
            "config": cfg.to_dict(),
            "tokenizer": meta["tokenizer"],
            "data": data.fingerprint,
            "step": step,
        }
        with Checkpointer(workdir / "checkpoints", keep=cfg.train.keep_checkpoints) as checkpoints:
            checkpoints.save(step, state, more | {"lineage": lineage} | kept)
        data.tokenizer.save(workdir)
        claim(workdir, cfg, data)
    return cfg


def _annealed(cfg: Config, old: Config, step: int, steps: int) -> Config:
    """`cfg` with the steps and the schedule of the branch. Raises ConfigError."""
    if steps < 1:
        raise ConfigError(f"--anneal_steps must be at least 1, got {steps}.")
    total, o = training_steps(old), old.optim
    warm = round(o.warmup * total)
    flat = total - round(o.decay * total) if o.schedule == "wsd" else total
    if o.schedule == "cosine" or not warm <= step <= flat:
        raise ConfigError(
            f"the learning rate of the parent is not constant at step {step} ({o.schedule}, constant from step {warm} to "
            f"{flat}); branch off one of these steps (--anneal_at), of a run with the schedule 'wsd' or 'constant'."
        )
    end = step + steps
    optim = dataclasses.replace(cfg.optim, schedule="wsd", warmup=warm / end, decay=steps / end)
    return dataclasses.replace(
        cfg, optim=optim, train=dataclasses.replace(cfg.train, steps=end, flops=0.0)
    )


def _same_state(old: Config, cfg: Config, parent: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a field that the parent's state depends on."""
    changed = differences(old.to_dict(), cfg.to_dict())
    wrong = [
        text
        for text in changed
        if kind_of(text.partition(":")[0].removeprefix("config.")) == "never"
    ]
    if old.train.batch_size != cfg.train.batch_size:
        wrong.append(
            f"config.train.batch_size: {old.train.batch_size} there, {cfg.train.batch_size} here"
        )
    if bool(old.optim.ema) != bool(cfg.optim.ema):
        wrong.append(f"config.optim.ema: {old.optim.ema} there, {cfg.optim.ema} here")
    if old.adapter.rank:
        wrong.append("adapters cannot be branched off; merge them (launch.convert --merge)")
    if wrong:
        raise ConfigError(f"the state of {parent} does not fit: {'; '.join(wrong)}.")
