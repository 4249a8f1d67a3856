"""The run: data -> batches -> steps, with evaluation, checkpoints, and an end that loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mor_jax.analysis import accounting
from mor_jax.analysis.ngram import TrigramByteModel, rows_to_bytes
from mor_jax.config import Config, check, from_dict
from mor_jax.data.loader import Loader, eval_batches
from mor_jax.data.prepare import PreparedData, prepare
from mor_jax.errors import CheckpointError, ConfigError, UserError
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.checkpoint import Checkpointer
from mor_jax.train.evaluate import evaluate, padded_token_bytes
from mor_jax.train.metrics import MetricWriter
from mor_jax.train.progress import Progress
from mor_jax.train.schedule import learning_rate, optimizer_of
from mor_jax.train.state import TrainState, abstract_state, create_state
from mor_jax.train.step import StagedStep

# Fields that may differ between a run and its resumption: they change what is reported, not what is computed.
FREE_TO_CHANGE = {"log_every", "eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints"}
TRIGRAM_BYTES = 32 << 20  # training text the reference trigram model reads at most


class TrainingError(UserError):
    """The run cannot go on; checkpoints already written are good."""


def resolve(cfg: Config, data: PreparedData) -> Config:
    """The configuration with everything that depends on the tokenizer filled in.

    Raises ConfigError when the tokenizer does not fit a given `vocab_size`.
    """
    size, given = data.tokenizer.vocab_size, cfg.model.vocab_size
    if given and size > given:
        raise ConfigError(
            f"the tokenizer has {size} tokens, config.model.vocab_size = {given} has room for fewer; "
            f"set it to at least {size}, or to 0 to follow the tokenizer."
        )
    model = dataclasses.replace(cfg.model, vocab_size=given or -(-size // 64) * 64)
    return dataclasses.replace(cfg, model=model)


def train(cfg: Config, workdir: str | os.PathLike[str], *, progress: bool = True) -> dict[str, Any]:
    """Train, or go on with, the run in `workdir`.

    The directory then holds config.json, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/<step>/ and, once
    finished, summary.json (which is returned). A run that was stopped resumes from its last good checkpoint with the
    same rows and the same numbers. SIGTERM and the first SIGINT save and return early, with {"finished": False}.

    Raises:
      ConfigError, DataError, CheckpointError: see their messages.
      TrainingError: loss, gradient or update of a step was not finite.
    """
    workdir = Path(workdir)
    mesh = make_mesh(cfg.mesh)
    with jax.set_mesh(mesh), _stop_signals() as stop:
        data = prepare(cfg.data, cfg.model.context, progress=progress)
        cfg = resolve(cfg, data)
        check(cfg, devices=mesh.size)
        claim(workdir, cfg, data)
        run = _Run(cfg, workdir, data, mesh, progress)
        return run.finished() or run.go(stop)


class _Run:
    def __init__(self, cfg: Config, workdir: Path, data: PreparedData, mesh: jax.sharding.Mesh, progress: bool):
        self.cfg, self.workdir, self.data, self.mesh = cfg, workdir, data, mesh
        self.lm = LM.from_config(cfg)
        self.steps = accounting.training_steps(cfg)
        self.tx = optimizer_of(cfg, self.steps)
        self.schedule = learning_rate(cfg.optim, self.steps)
        self.batch_sharding = NamedSharding(mesh, self.lm.rules.spec(("batch", "time")))
        self.token_bytes = padded_token_bytes(data.tokenizer.token_bytes, cfg.model.vocab_size)
        self.meta = {"config": cfg.to_dict(), "tokenizer": data.tokenizer.to_json(), "data": data.fingerprint}
        peak = accounting.peak_flops(jax.devices()[0].device_kind, cfg.model.dtype)
        self.peak = peak and peak * mesh.size
        self.show = progress and jax.process_index() == 0
        self.seconds = 0.0  # training proper, this process

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that has nothing left to do."""
        path = self.workdir / "summary.json"
        if not path.exists():
            return None
        self.bar = Progress(self.steps, shown=self.show)
        self.bar.say(
            f"{self.workdir} is finished: all {self.steps} steps are done. Give another --workdir to train anew."
        )
        self.bar.close()
        return json.loads(path.read_text())

    def go(self, stop: _Stop) -> dict[str, Any]:
        cfg = self.cfg
        with Checkpointer(self.workdir / "checkpoints", keep=cfg.train.keep_checkpoints) as self.checkpoints:
            state, first = self._start()
            self.metrics = MetricWriter(self.workdir, resume_step=first, active=jax.process_index() == 0)
            try:
                state, last = self._steps(state, first, stop)
                if last < self.steps:
                    self._save(last, state)
                    self.checkpoints.wait()
                    self.bar.say(
                        f"Stopped by {stop.name} after step {last}; saved. The same command goes on from here."
                    )
                    return {"finished": False, "step": last}
                return self._finish(state)
            finally:
                self.bar.close()
                self.metrics.close()

    def _start(self) -> tuple[TrainState, int]:
        """Resume if there is something to resume, else initialise."""
        self.bar = Progress(self.steps, shown=self.show)
        restored = self.checkpoints.restore_latest(abstract_state(self.lm, self.tx, self.mesh))
        if restored:
            self._same_data(restored.meta)
            for step, why in restored.skipped.items():
                self.bar.say(f"Checkpoint of step {step} is damaged ({why}); it was set aside.")
            self.bar.say(f"Resuming {self.workdir} after step {restored.step}.")
            return restored.state, restored.step
        return create_state(self.lm, self.tx, self.mesh, self.cfg.train.seed), 0

    def _same_data(self, meta: dict[str, Any]) -> None:
        """Refuse to go on with weights whose token ids or rows meant something else."""
        if meta["tokenizer"] != self.meta["tokenizer"]:
            raise CheckpointError(
                f"the tokenizer {self.cfg.data.tokenizer!r} does not fit the checkpoint in {self.workdir}: it was trained "
                "with another one. Put the old one back, or give another --workdir."
            )
        if meta["data"] != self.meta["data"]:
            raise CheckpointError(
                f"the corpus has changed since {self.workdir} was started, so the run cannot go on with the same rows. "
                "Restore the corpus, or give another --workdir."
            )

    def _steps(self, state: TrainState, first: int, stop: _Stop) -> tuple[TrainState, int]:
        """Steps first + 1 .. ; returns at the end or when asked to stop."""
        t = self.cfg.train
        step_fn = StagedStep(self.lm, self.tx, t.accum, self.token_bytes)
        loader = Loader(self.data.train, t.batch_size, seed=self.cfg.data.seed, sharding=self.batch_sharding)
        batches = loader.iter_from_step(
            first
        )  # the batch of step s + 1 is number s: position is a function of the step
        clock = _Clock()
        pending: tuple[int, dict] | None = None
        try:
            for step in range(first + 1, self.steps + 1):
                state, metrics = step_fn(step - 1)(state, next(batches))
                if pending:  # read while this step runs
                    self._record(*pending, clock)
                pending = (step, metrics)
                self.checkpoints.check()
                last = step == self.steps
                due = lambda every: bool(every) and step % every == 0  # noqa: B023
                if stop.requested or last or due(t.eval_every) or due(t.checkpoint_every):
                    self._record(*pending, clock)
                    pending = None
                    clock.pause()
                    if not stop.requested and (last or due(t.eval_every)):
                        self._evaluate(step, state)
                    if not stop.requested and (last or due(t.checkpoint_every)):
                        self._save(step, state)
                    clock.go_on()
                if stop.requested:
                    return state, step
        finally:
            batches.close()
            self.seconds = clock.total()
        return state, max(first, self.steps)

    def _record(self, step: int, metrics: dict[str, jax.Array], clock: _Clock) -> None:
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        clock.tick()
        bad = [k for k in ("loss", "grad_norm", "update_norm") if not np.isfinite(values[k])]
        if bad:
            with contextlib.suppress(CheckpointError):
                self.checkpoints.wait()  # one under way counts, if it succeeds
            steps = self.checkpoints.steps()
            kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise TrainingError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; the run was stopped and {kept}. Lower "
                "config.optim.peak_lr, lengthen config.optim.warmup, or look at the rows of that step."
            )
        if step % self.cfg.train.log_every and step != self.steps:
            return
        rate = clock.rate()  # steps a second since the last record
        flops = accounting.true_step_flops(self.cfg, step)
        tokens = accounting.tokens_per_step(self.cfg)
        values |= {
            "lr": float(self.schedule(step - 1)),
            "time_s": clock.total(),
            "tokens": step * tokens,
            "tokens_per_s": rate * tokens,
            "flops_per_s": rate * flops,
            "mfu": rate * flops / self.peak if self.peak else None,
        }
        self.metrics.write("train", step, values)
        self.bar.update(step, values)

    def _evaluate(self, step: int, state: TrainState) -> dict[str, Any]:
        t = self.cfg.train
        rows = t.batch_size // t.accum
        batches = eval_batches(self.data.validation, rows, limit=t.eval_rows, sharding=self.batch_sharding)
        record = evaluate(self.lm, state.params, list(batches), self.token_bytes)
        self.metrics.write("eval", step, record)
        self.bar.evaluation(step, record)
        self.last_eval = record
        return record

    def _save(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(step, state, {**self.meta, "step": step})

    def _finish(self, state: TrainState) -> dict[str, Any]:
        """Everything durable, then the summary."""
        self.checkpoints.wait()
        record = getattr(self, "last_eval", None) or self._evaluate(self.steps, state)  # resumed after the last step
        cfg = self.cfg
        fixed = cfg.depth.policy == "fixed"
        summary = {
            "finished": True,
            "name": cfg.name,
            "steps": self.steps,
            "seconds": self.seconds,
            "tokens": self.steps * accounting.tokens_per_step(cfg),
            "parameters": accounting.parameters(cfg.model, cfg.depth).to_dict(),
            "paper_flops_per_token": accounting.paper_flops_per_token(cfg.model, cfg.depth),
            "true_flops_per_token": accounting.true_flops_per_token(cfg.model, cfg.depth).total,
            "paper_training_flops": accounting.paper_training_flops(cfg, self.steps),
            "true_training_flops": accounting.true_training_flops(cfg, self.steps),
            "kv_bytes_per_token": accounting.kv_bytes_per_token(
                # With a fixed depth there is nothing to measure, and a block repeated in place has no steps to share.
                cfg.model,
                cfg.depth,
                mean_active=None if fixed else record["causal/active_share"],
            ),
            "trigram_bits_per_byte": self._trigram(),
            "eval": record,
            "data": self.data.stats,
            "device": f"{mesh_device(self.mesh)}",
            "versions": versions(),
        }
        if jax.process_index() == 0:
            # A held-out passage for reports, which then need no corpus.
            text = self.data.tokenizer.decode(self.data.validation[0]["tokens"])
            (self.workdir / "sample.txt").write_text(text, encoding="utf-8")
            _write_json(self.workdir / "summary.json", summary)
        return summary

    def _trigram(self) -> float | None:
        """Bits per byte of a trigram model on the rows the evaluation read: the floor a trained model must beat."""
        tokenizer, cfg = self.data.tokenizer, self.cfg
        if not tokenizer.token_bytes.any() or jax.process_index() != 0:
            return None
        bytes_per_row = self.data.stats["train"]["bytes"] / max(len(self.data.train), 1)
        rows = min(len(self.data.train), int(TRIGRAM_BYTES / max(bytes_per_row, 1.0)) + 1)
        held_out = min(cfg.train.eval_rows or len(self.data.validation), len(self.data.validation))
        model = TrigramByteModel.fit(rows_to_bytes((self.data.train[i] for i in range(rows)), tokenizer))
        return model.bits_per_byte(rows_to_bytes((self.data.validation[i] for i in range(held_out)), tokenizer))


class _Clock:
    """Time spent stepping: evaluation and saving are not in it, nor is the first step, which compiles."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._total = 0.0
        self._counted, self._steps, self._first = 0.0, 0, True

    def tick(self) -> None:
        if self._first:
            self._first = False
            self._counted = self.total()
        else:
            self._steps += 1

    def pause(self) -> None:
        self._total += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def total(self) -> float:
        return self._total + time.perf_counter() - self._since

    def rate(self) -> float:
        elapsed, steps = self.total() - self._counted, self._steps
        self._counted, self._steps = self.total(), 0
        return steps / elapsed if elapsed > 0 else 0.0


class _Stop:
    """Whether a signal asked the run to end, and which."""

    def __init__(self) -> None:
        self.name = ""

    @property
    def requested(self) -> bool:
        return bool(self.name)


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """SIGTERM and SIGINT ask for a save and an early end; a second SIGINT interrupts at once."""
    stop, previous = _Stop(), {}

    def handler(number: int, _frame: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.name = signal.Signals(number).name

    with contextlib.suppress(ValueError):  # not the main thread (a notebook server, say): no handlers then
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def claim(workdir: Path, cfg: Config, data: PreparedData) -> None:
    """Make `workdir` this run's: config.json and tokenizer.json. Raises ConfigError if it holds another one."""
    path = workdir / "config.json"
    if jax.process_index() != 0:
        return
    try:
        if path.exists():
            saved = from_dict(json.loads(path.read_text())).to_dict()
            changed = differences(saved, cfg.to_dict())
            if changed:
                raise ConfigError(
                    f"{workdir} holds a run with another configuration ({'; '.join(changed)}). "
                    "Give another --workdir, or the same configuration to resume."
                )
        workdir.mkdir(parents=True, exist_ok=True)
        _write_json(path, cfg.to_dict())
        if not any((workdir / "checkpoints").glob("[0-9]*")):  # else it is kept until it has been compared with theirs
            data.tokenizer.save(workdir)
    except OSError as e:
        raise UserError(f"cannot write to the run directory {workdir}: {e.strerror or e}.") from e
    except ValueError as e:
        raise ConfigError(f"{path} is not readable JSON ({e}); repair it or give another --workdir.") from e


def differences(old: dict, new: dict, where: str = "config") -> list[str]:
    """What keeps a run of configuration `new` from going on where one of `old` stopped; a phrase for each field."""
    changed = []
    for key in new:
        a, b = old.get(key), new[key]
        if isinstance(b, dict):
            changed += differences(a or {}, b, f"{where}.{key}")
        elif json.dumps(a) != json.dumps(b) and key not in FREE_TO_CHANGE and key != "cache_dir":
            changed.append(f"{where}.{key}: {a!r} there, {b!r} here")
    return changed


def _write_json(path: Path, value: Any) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def mesh_device(mesh: jax.sharding.Mesh) -> str:
    """For example "8 x TPU v5 lite, mesh 2x2x2" or "1 x cpu (2 cores)"."""
    device = mesh.devices.flat[0]
    kind = f"{device.device_kind} ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
    shape = f", mesh {'x'.join(map(str, mesh.devices.shape))}" if mesh.size > 1 else ""
    return f"{mesh.size} x {kind}{shape}"


def versions() -> dict[str, str]:
    """Python and the libraries whose version could change a number."""
    from importlib.metadata import version

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "mor-jax")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
