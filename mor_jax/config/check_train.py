"""Which data, optimisers and lengths of training can be run."""

from __future__ import annotations

import math

from mor_jax.config.config import Config
from mor_jax.config.fields import (
    ALGORITHMS,
    BAD_RECORDS,
    BAD_STEP,
    DEDUP,
    FORMATS,
    SCHEDULES,
    SOURCES,
    TARGETS,
    AdapterConfig,
    DataConfig,
    DistillConfig,
)
from mor_jax.config.refusals import nearest_multiples, one_of, positive
from mor_jax.errors import ConfigError


def check_data(d: DataConfig) -> None:
    where = "config.data"
    one_of(f"{where}.source", d.source, SOURCES)
    one_of(f"{where}.bad_records", d.bad_records, BAD_RECORDS)
    if d.mixture:
        _check_mixture(d)
    elif d.source == "files" and not d.paths:
        raise ConfigError(
            f"{where}.source = 'files' needs {where}.paths, e.g. --config.data.paths=\"('corpus/*.jsonl.gz',)\"."
        )
    if d.source == "tfds" and not (d.name or d.paths):
        raise ConfigError(
            f"{where}.source = 'tfds' needs {where}.name (a prepared data set) or its directory in {where}.paths."
        )
    if not 0 < d.holdout < 1:
        raise ConfigError(f"{where}.holdout must be a share between 0 and 1, got {d.holdout}.")
    one_of(f"{where}.format", d.format, FORMATS)
    if d.conversations and not d.train_roles:
        raise ConfigError(
            f"{where}.train_roles is empty: no message would have a loss. Give at least one role."
        )
    if d.format == "preference" and (d.source == "tfds" or d.text_key):
        raise ConfigError(
            f"{where}.format = 'preference' reads the fields chosen and rejected of files: set {where}.source = 'files' "
            f"and leave {where}.text_key empty."
        )
    if d.conversations and d.source == "pystdlib":
        raise ConfigError(
            f"{where}.format = {d.format!r} needs conversations: set {where}.source = 'files' and {where}.paths."
        )
    one_of(f"{where}.dedup", d.dedup, DEDUP)
    if d.bpe_vocab < 258:
        raise ConfigError(
            f"{where}.bpe_vocab = {d.bpe_vocab} cannot hold the 256 bytes and 2 special tokens; give at least 258."
        )


def _check_mixture(d: DataConfig) -> None:
    where = "config.data.mixture"
    if d.source != "files" or d.paths:
        raise ConfigError(
            f"{where} names the files of each source: set config.data.source = 'files' and leave paths empty."
        )
    if not all(paths and 0 < weight < math.inf for paths, weight in d.mixture):
        raise ConfigError(f"{where} must be pairs of globs and a positive weight, got {d.mixture}.")
    if len({paths for paths, _ in d.mixture}) < len(d.mixture):
        raise ConfigError(f"{where} names a source twice; give it the sum of the weights.")
    if d.tokenizer == "bpe":
        raise ConfigError(
            f"{where} needs a tokenizer that is there already: train one on config.data.paths, and give its tokenizer.json "
            "as config.data.tokenizer."
        )


def check_train(cfg: Config) -> None:
    t, o = cfg.train, cfg.optim
    one_of("config.optim.schedule", o.schedule, SCHEDULES)
    one_of("config.optim.algorithm", o.algorithm, ALGORITHMS)
    positive("config.optim", peak_lr=o.peak_lr, eps=o.eps)
    for name, value in (("b1", o.b1), ("b2", o.b2), ("ema", o.ema)):
        if not 0 <= value < 1:
            raise ConfigError(f"config.optim.{name} must be in [0, 1), got {value}.")
    for name, value in (("warmup", o.warmup), ("decay", o.decay), ("final_lr", o.final_lr)):
        if not 0 <= value <= 1:
            raise ConfigError(f"config.optim.{name} is a share and must be in [0, 1], got {value}.")
    if o.schedule == "wsd" and o.warmup + o.decay > 1:
        raise ConfigError(
            f"config.optim: warmup {o.warmup} and decay {o.decay} together exceed the run."
        )
    if o.clip_norm < 0 or o.weight_decay < 0 or not 0 <= o.core_lr < math.inf:
        raise ConfigError("config.optim: clip_norm, weight_decay and core_lr must not be negative.")
    if t.patience < 0 or (t.patience and not t.eval_every):
        raise ConfigError(
            f"config.train.patience = {t.patience} counts evaluations, and needs config.train.eval_every above 0."
        )
    if 0 < t.steps <= cfg.depth.warmup:
        raise ConfigError(
            f"config.depth.warmup = {cfg.depth.warmup} is the whole run, config.train.steps = {t.steps}: the model would "
            "never be trained as it is evaluated. Use fewer steps of warm-up."
        )
    if t.steps < 0 or t.flops < 0 or t.steps == t.flops == 0:
        raise ConfigError(
            f"config.train: give steps, or flops to derive them from; got steps = {t.steps}, flops = {t.flops:g}."
        )
    positive(
        "config.train",
        batch_size=t.batch_size,
        accum=t.accum,
        log_every=t.log_every,
        keep_checkpoints=t.keep_checkpoints,
    )
    if min(t.eval_every, t.eval_rows, t.checkpoint_every, t.seed, cfg.data.seed) < 0:
        raise ConfigError(
            "config.train: eval_every, eval_rows, checkpoint_every and the seeds must not be negative."
        )
    one_of("config.train.on_nonfinite", t.on_nonfinite, BAD_STEP)
    one_of("config.train.on_spike", t.on_spike, BAD_STEP)
    if not (t.spike_threshold >= 0 and math.isfinite(t.spike_threshold)):
        raise ConfigError(
            f"config.train.spike_threshold must be a number and not negative, got {t.spike_threshold}."
        )
    _check_lengths(cfg)
    _check_distill(cfg.distill)
    if cfg.distill.weight and cfg.recursion.trains:
        raise ConfigError(
            f"config.distill.weight = {cfg.distill.weight} goes with the loss of the last step, but config.recursion "
            "draws the depth or takes a loss of every step. Use one of the two."
        )
    _check_adapter(cfg.adapter)
    if cfg.data.format == "preference":
        _check_preference(cfg)
    if t.batch_size % t.accum:
        raise ConfigError(
            f"config.train.batch_size = {t.batch_size} rows cannot be split into accum = {t.accum} micro-batches; "
            f"nearest that can: {nearest_multiples(t.batch_size, t.accum)}."
        )


def _check_lengths(cfg: Config) -> None:
    where, given, context = "config.train.lengths", cfg.train.lengths, cfg.model.context
    if not given:
        return
    lengths, shares = [n for n, _ in given], [share for _, share in given]
    if lengths != sorted(set(lengths)) or not all(2 <= n < context for n in lengths):
        raise ConfigError(
            f"{where} must rise and lie between 2 and config.model.context = {context}, got {lengths}."
        )
    if wrong := [n for n in lengths if context % n]:
        raise ConfigError(
            f"{where}: rows of config.model.context = {context} tokens cannot be cut into pieces of {wrong[0]}."
        )
    if min(shares) <= 0 or sum(shares) >= 1:
        raise ConfigError(
            f"{where}: shares of the steps must be positive, below 1 together, got {shares}."
        )
    why = ""
    if cfg.data.conversations:
        why = f"config.data.format = {cfg.data.format!r} keeps conversations whole"
    elif cfg.mesh.sequence != 1:
        why = f"config.mesh.sequence = {cfg.mesh.sequence} cuts rows along time, too"
    elif cfg.depth.tile > lengths[0]:
        why = f"config.depth.tile = {cfg.depth.tile} is more than the shortest rows, {lengths[0]} tokens"
    if why:
        raise ConfigError(f"{where} cuts rows into pieces, but {why}. Leave one of the two out.")


def _check_distill(d: DistillConfig) -> None:
    where = "config.distill"
    if not 0 <= d.weight <= 1:
        raise ConfigError(f"{where}.weight is a share and must be in [0, 1], got {d.weight}.")
    if not 0 < d.temperature < math.inf:
        raise ConfigError(f"{where}.temperature must be positive, got {d.temperature}.")
    if d.weight and not d.teacher:
        raise ConfigError(
            f"{where}.weight = {d.weight} needs {where}.teacher, the run directory of the teacher."
        )


def _check_preference(cfg: Config) -> None:
    beta = cfg.preference.beta
    if not 0 < beta < math.inf:
        raise ConfigError(f"config.preference.beta must be positive, got {beta}.")
    why = ""
    if cfg.distill.weight:
        why = f"config.distill.weight = {cfg.distill.weight} has a loss of its own"
    elif cfg.recursion.trains:
        why = "config.recursion draws the depth or takes a loss of every step"
    elif cfg.mesh.sequence != 1:
        why = f"config.mesh.sequence = {cfg.mesh.sequence} cuts a row between the two of a pair"
    if why:
        raise ConfigError(
            f"config.data.format = 'preference' compares the two conversations of a pair, and {why}. Use one of the two."
        )


def _check_adapter(a: AdapterConfig) -> None:
    where = "config.adapter"
    if a.rank < 0 or not 0 < a.alpha < math.inf:
        raise ConfigError(
            f"{where}: rank must not be negative, alpha positive; got {a.rank} and {a.alpha}."
        )
    for name in a.targets:
        one_of(f"{where}.targets", name, TARGETS)
    if a.rank and not a.targets:
        raise ConfigError(
            f"{where}.targets is empty: nothing would be trained. Give some of {', '.join(TARGETS)}."
        )
