"""The training loop: data, batches, steps, evaluation, checkpoints, and a stop that saves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from mor_jax.analysis import accounting
from mor_jax.config import Config, check
from mor_jax.data.loader import Loader, eval_batches
from mor_jax.data.prepare import PreparedData, prepare
from mor_jax.data.progress import say, still
from mor_jax.data.vocabulary import FILE as TOKENIZER
from mor_jax.errors import CheckpointError, ConfigError
from mor_jax.nn.attention import chosen_for
from mor_jax.parallel import join
from mor_jax.parallel.mesh import make_mesh
from mor_jax.parallel.multihost import Hosts
from mor_jax.paths import as_path, reason, write_text
from mor_jax.train.best import Best
from mor_jax.train.checkpoint import Checkpointer, load_meta
from mor_jax.train.debug import Debug, Tracer, compile_step
from mor_jax.train.distill import load_teacher
from mor_jax.train.evaluate import evaluate, padded_token_bytes
from mor_jax.train.faults import OK, REWIND, Faults
from mor_jax.train.goodput import FILE as GOODPUT
from mor_jax.train.goodput import Clock, Goodput, stragglers
from mor_jax.train.initial import Origin
from mor_jax.train.load import Loaded, describe
from mor_jax.train.lock import RunLock, hold
from mor_jax.train.metrics import FILE as METRICS
from mor_jax.train.metrics import MetricWriter
from mor_jax.train.objective import NEXT_TOKEN, Objective
from mor_jax.train.outbox import Outbox
from mor_jax.train.progress import TrainingBar
from mor_jax.train.schedule import learning_rate, optimizer_of
from mor_jax.train.state import TrainState
from mor_jax.train.step import Program, StagedStep
from mor_jax.train.stop import Stop, stop_signals
from mor_jax.train.summary import counted, sample_text, trigram_bits_per_byte
from mor_jax.train.trackers import IDS as TRACKERS
from mor_jax.train.trackers import TrackedRun, open_trackers
from mor_jax.train.workdir import allows_other_data, claim, mesh_device, versions, write_json

# A measure of a model that is more than its loss, by name: {"rlm/s_niah/8000/success": 0.9}
Measure = Callable[[Loaded], Mapping[str, float]]


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


def _with_table(
    cfg: Config, workdir: epath.Path, init_from: str | os.PathLike[str], data: PreparedData
) -> Config:
    """A `vocab_size` of 0 is that of the weights a run begins with: published tables are often
    longer than `resolve`'s."""
    rows = 0
    if cfg.model.vocab_size:
        return cfg
    # no run yet, or one that `claim` refuses
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if (workdir / TOKENIZER).read_text(encoding="utf-8") == data.tokenizer.to_json():
            rows = json.loads((workdir / "config.json").read_text())["model"]["vocab_size"]
    if not rows and init_from:
        rows = describe(init_from)[0].model.vocab_size
    rows = rows if rows >= data.tokenizer.vocab_size else 0
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=rows))


def train(
    cfg: Config,
    workdir: str | os.PathLike[str],
    *,
    progress: bool = True,
    debug: Debug | None = None,
    wait: float | None = None,
    allow: Sequence[str] = (),
    init_from: str | os.PathLike[str] = "",
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Train, or go on with, the run in `workdir`, a path of this machine or one that starts with
    gs:// or s3://.

    The directory then holds config.json, tokenizer.json, metrics.jsonl, goodput.json, tensorboard/,
    program/, checkpoints/<step>/ and, once finished, summary.json (which is returned). A run that
    was stopped resumes from its last good checkpoint with the same rows and the same numbers, on
    any mesh and any number of hosts that divide the batch. SIGTERM, SIGUSR1 and the first SIGINT
    save and return early, with {"finished": False}.

    Args:
      wait: seconds to wait for another process that works in `workdir`; None: see
        `train.lock.hold`.
      allow: fields that may differ from those of the run in `workdir`, see `train.workdir`.
      init_from: run directory or checkpoints whose weights a new run starts from, see
        `train.initial`; a run that goes on in `workdir` must have started from the same.
      measure: called at each evaluation with the model as it stands; what it returns joins the
        evaluation's record. One process only.

    In a job of several processes (`parallel.join.initialize`) all of them call this with the same
    arguments and a directory that all see; a signal to any of them stops all after the same step.

    Raises:
      ConfigError, DataError, CheckpointError: see their messages.
      InUse: another process works in `workdir`.
      TrainingError: a bad step that config.train's policies do not pass over.
    """
    workdir, hosts, debug = as_path(workdir), join.hosts(), debug or Debug()
    mesh, first = make_mesh(cfg.mesh), hosts.rank == 0

    def tell(line: str) -> None:
        return say(line, shown=progress)

    with (
        jax.set_mesh(mesh),
        debug.applied(),
        hosts.guard(),
        # before signals: one ends a process that waits
        hold(workdir, wait=wait, active=first, say=tell) as lock,
        stop_signals(hosts) as stop,
    ):
        outbox = Outbox(workdir, (METRICS, GOODPUT, TRACKERS) if first else ())
        goodput = Goodput(outbox.directory / GOODPUT if first else None)
        hosts.report(phase="preparing the data")
        data = prepare(cfg.data, cfg.model.context, progress=progress)
        hosts.assert_equal(
            "the prepared data", data.fingerprint, "Give all hosts the same corpus and tokenizer."
        )
        cfg = resolve(_with_table(cfg, workdir, init_from, data), data)
        try:
            check(cfg, devices=mesh.size)
            chosen_for(cfg.model)
        except ConfigError as e:
            e.everywhere = True
            raise
        hosts.assert_equal(
            "the configuration",
            json.dumps(cfg.to_dict()),
            "Start all processes with the same command.",
        )
        changed = claim(workdir, cfg, data, allow)
        hosts.barrier("the run directory is claimed")
        seen = str([(workdir / name).exists() for name in ("config.json", "summary.json")])
        hosts.assert_equal(
            "what is in the run directory", seen, f"{workdir} must be one that all hosts see."
        )
        steps = accounting.training_steps(cfg)
        bar = TrainingBar(steps, shown=progress and first)
        try:
            other_data = allows_other_data(allow)
            origin = Origin(cfg, workdir, data, mesh, init_from, other_data, bar.say)
            context = RunContext(
                cfg, steps, workdir, data, mesh, hosts, goodput, debug, lock, outbox, bar, origin
            )
            done = _finished(context)
            if done is None:
                with (
                    Checkpointer(
                        workdir / "checkpoints", keep=cfg.train.keep_checkpoints
                    ) as checkpoints,
                    contextlib.closing(Best(workdir / "best", cfg.train.keep_best)) as best,
                ):
                    measure = measure if hosts.count == 1 else None
                    done = _Run(context, checkpoints, best, measure).go(stop, changed)
        finally:
            bar.close()  # else a terminal that saw an error would stay without its cursor
            # what a checkpoint knows of has been uploaded before it
            with contextlib.suppress(OSError):
                outbox.close()
        hosts.barrier("the end")
        return done


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What a run works with, made by `train`."""

    cfg: Config
    steps: int
    workdir: epath.Path
    data: PreparedData
    mesh: jax.sharding.Mesh
    hosts: Hosts
    goodput: Goodput
    debug: Debug
    lock: RunLock | None
    outbox: Outbox
    bar: TrainingBar
    origin: Origin


def _finished(c: RunContext) -> dict[str, Any] | None:
    """The summary if the run is finished, else None."""
    path = c.workdir / "summary.json"
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    meta = None
    # without any checkpoint there is nothing to compare with
    with contextlib.suppress(CheckpointError):
        meta = load_meta(c.workdir / "checkpoints")[1]
    if meta:
        c.origin.check_data(meta)
    if c.steps > int(summary.get("steps") or c.steps):
        return None  # it was allowed more steps, else `claim` had refused them
    c.bar.say(
        f"{c.workdir} is finished: all {c.steps} steps are done. Give another --workdir to train anew."
    )
    return summary


class _Run:
    """Steps, evaluations and checkpoints, from the last good checkpoint or the beginning on."""

    def __init__(
        self,
        context: RunContext,
        checkpoints: Checkpointer,
        best: Best,
        measure: Measure | None,
    ):
        c = context
        cfg, self.cfg, self.steps, self.workdir, self.data = (
            c.cfg,
            c.cfg,
            c.steps,
            c.workdir,
            c.data,
        )
        self.mesh, self.hosts, self.goodput, self.debug = c.mesh, c.hosts, c.goodput, c.debug
        self.lock, self.outbox, self.bar, self.origin = c.lock, c.outbox, c.bar, c.origin
        self.checkpoints, self.best, self.measure = checkpoints, best, measure
        self.lm, self.meta = c.origin.lm, c.origin.meta
        self.tx = optimizer_of(cfg, self.steps)
        self.schedule = learning_rate(cfg.optim, self.steps)
        self.batch_sharding = NamedSharding(self.mesh, self.lm.rules.spec(("batch", "time")))
        self.token_bytes = padded_token_bytes(c.data.tokenizer.token_bytes, cfg.model.vocab_size)
        peak = accounting.peak_flops(jax.devices()[0].device_kind, cfg.model.dtype)
        self.peak = peak and peak * self.mesh.size
        self.seconds = 0.0  # training proper, this process
        self.compiled = 0  # programs so far
        self.last_eval: dict[str, Any] | None = None  # record of the newest evaluation
        self.last_average: dict[str, Any] | None = None  # of the running mean of the weights
        self.ended = 0  # step after which the run ended early
        self.bad_step = 0  # the newest one
        self.clock = Clock()
        self.hosts.report(phase="restoring or initialising")
        teacher = load_teacher(cfg, c.data.tokenizer, self.lm, self.mesh)
        self.first_state, self.first, meta = self._last_good()
        self.objective: Objective = teacher or NEXT_TOKEN
        if cfg.data.format == "preference":
            self.objective = self.origin.reference()
        self.faults = Faults(cfg.train, meta.get("faults"))
        self.owes_evaluation = meta.get("owes_evaluation", False)
        best.go_on_from(self.first, meta.get("best"))
        if meta:  # a converted model's is of step 0
            self.bar.say(f"Resuming {self.workdir} after step {self.first}.")
            self._advise(self.first)
        self.metrics = self._writer(self.first)

    def go(self, stop: Stop, changed: Sequence[str]) -> dict[str, Any]:
        """Trains to the end, or until `stop`; the summary, or where it stopped.

        `changed`: fields that differ from those the run was started with."""
        cfg, first = self.cfg, self.first
        state = self.first_state
        del self.first_state  # the steps give its buffers away
        if changed:
            self.metrics.write("event", first, {"event": "changed", "fields": list(changed)})
        try:
            if self.owes_evaluation:
                self._evaluate(first, state)
            patience = cfg.train.patience
            # it was stopped between its end and the summary
            if patience and self.best.since >= patience:
                self.ended = last = first
            else:
                state, last = self._steps(state, first, stop)
            if last < self.steps and not self.ended:
                every = cfg.train.eval_every
                # the end is in a hurry
                self._save(last, state, owes_evaluation=bool(every) and last % every == 0)
                self.checkpoints.wait()
                self.bar.say(
                    f"Stopped by {stop.name} after step {last}; saved. The same command goes on from hosts."
                )
                return {"finished": False, "step": last}
            return self._finish(state)
        finally:
            self.metrics.close()
            self.goodput.write()

    def _writer(self, step: int) -> MetricWriter:
        active, directory = self.hosts.rank == 0, self.outbox.directory
        run = TrackedRun(self.cfg.name, self.cfg.to_dict(), directory, step)
        trackers = open_trackers(self.cfg.train.trackers, run) if active else {}
        return MetricWriter(
            directory, resume_step=step, active=active, trackers=trackers, say=self.bar.say
        )

    def _last_good(self) -> tuple[TrainState, int, dict[str, Any]]:
        """(state, step, meta) of the newest checkpoint that verifies, or of the beginning."""
        restored = self.checkpoints.restore_latest(self.origin.abstract(self.tx))
        if restored is None:
            return self.origin.fresh(self.tx), 0, {}
        self.origin.accept(restored.meta)
        for step, why in restored.skipped.items():
            self.bar.say(f"Checkpoint of step {step} is damaged ({why}); it was set aside.")
        return restored.state, restored.step, restored.meta

    def _advise(self, step: int) -> None:
        self.hosts.advice = (
            f"The checkpoint of step {step} is whole: the same command goes on from there, on any number of processes "
            "that divides the batch."
        )

    def _steps(self, state: TrainState, first: int, stop: Stop) -> tuple[TrainState, int]:
        """Steps first + 1 .. ; returns at the end or when asked to stop."""
        t, goodput, faults = self.cfg.train, self.goodput, self.faults
        step_fn = StagedStep(
            self.lm,
            self.tx,
            t.accum,
            self.token_bytes,
            self._compile,
            self.objective,
            self.cfg.optim.ema,
            self.origin.adapters,
            self._cut_length if t.lengths else None,
        )
        frozen = {"teacher": self.objective.params, "base": self.origin.base}
        beside = {name: params for name, params in frozen.items() if params is not None}
        beside = (beside,) if beside else ()
        loader = Loader(
            self.data.train, t.batch_size, seed=self.cfg.data.seed, sharding=self.batch_sharding
        )
        # The batch is a function of the step, and of the batches that rewinds left out.
        batches = loader.iter_from_step(faults.position(first + 1))
        tracer = Tracer(self.debug.profile_steps, self.outbox.directory / "profile")
        clock = self.clock = Clock()
        pending, step = None, first
        try:
            while step < self.steps:
                step += 1
                goodput.enter("input")
                asked = time.perf_counter()
                batch, limit = next(batches), faults.limit(step)
                read = time.perf_counter()
                program = step_fn(step - 1, state, batch, limit, *beside)
                goodput.enter("step")
                tracer.before(step)
                begun = time.perf_counter()
                state, metrics = program(state, batch, limit, *beside)
                clock.own(read - asked, time.perf_counter() - begun)
                bad = pending and self._record(*pending) == REWIND  # read while this step runs
                pending = (step, metrics, limit)
                goodput.step(step)
                if written := tracer.after(step, metrics):
                    self.bar.say(
                        f"The trace is in {self.workdir / written.relative_to(self.outbox.directory)}."
                    )
                self.checkpoints.check()
                if self.lock:
                    self.lock.check()
                self.outbox.push_sometimes()
                last = step == self.steps
                stopping = stop.after_this_step() and not last

                def due(every: int) -> bool:
                    return bool(every) and step % every == 0  # noqa: B023

                if not bad and (stopping or last or due(t.eval_every) or due(t.checkpoint_every)):
                    bad, pending = self._record(*pending) == REWIND, None
                    clock.pause()
                    if not (bad or stopping) and (last or due(t.eval_every)):
                        self._evaluate(step, state)
                        if t.patience and self.best.since >= t.patience and not last:
                            self.ended = step
                    if not (bad or stopping) and (last or self.ended or due(t.checkpoint_every)):
                        self._save(step, state)
                    clock.go_on()
                if bad:
                    batches.close()
                    state, step = self._rewind(self.bad_step)
                    batches, pending = loader.iter_from_step(faults.position(step + 1)), None
                if self.ended:
                    self.bar.say(
                        f"Ended after step {step}: {t.patience} evaluations without a lower loss than at step {self.best.step}."
                    )
                if stopping or self.ended:
                    return state, step
        finally:
            batches.close()
            tracer.close()
            self.seconds = clock.total()
            goodput.enter("other")
        return state, step

    def _cut_length(self, step: int) -> int:
        """Tokens of the pieces that the rows of a step are cut into; 0: they stay whole."""
        context = self.cfg.model.context
        length = self.cfg.train.row_length(step, self.steps, context)
        return 0 if length == context else length

    def _compile(self, step_fn: Program, arguments: tuple[Any, ...]) -> Program:
        """Compiles the step, and prints where the time before the first step went."""
        self.goodput.enter("compile")
        self.hosts.report(phase="compiling")
        program_directory = self.outbox.directory / "program" if self.hosts.rank == 0 else None
        with still("compiling the training step", self.bar.say):
            program, note = compile_step(step_fn, arguments, self.debug, program_directory)
        s = self.goodput.seconds()
        if not s["step"]:
            self.bar.say(
                f"The first step begins after {sum(s.values()):.1f} s: data and state {s['start']:.1f} s, first rows "
                f"{s['input']:.1f} s, step {note}. Attention: {chosen_for(self.cfg.model)}."
            )
        # Compiling takes hosts unequally long, and the first collective waits for the others half a
        # minute at most.
        self.compiled += 1
        self.hosts.barrier(f"program {self.compiled} is compiled")
        self.hosts.report(phase="training")
        return program

    def _rewind(self, bad: int) -> tuple[TrainState, int]:
        """Back to the last good checkpoint; the rows up to the bad step are left out from now
        on."""
        with self.goodput.during("rewind"):
            self.clock.pause()
            self.checkpoints.wait()
            state, good, meta = self._last_good()
            self.faults.rewind(bad, good)
            self.best.go_on_from(good, meta.get("best"))
            self.metrics.close()
            self.metrics = self._writer(good)
            self.metrics.write("event", good, {"event": REWIND, "from": bad})
            self.bar.say(
                f"Back to step {good}; the {bad - good} batches up to the bad one are left out."
            )
            self.clock.go_on()
        return state, good

    def _record(self, step: int, metrics: dict[str, jax.Array], limit: Any) -> str:
        values: dict[str, Any] = {
            k: float(v) if np.ndim(v) == 0 else [round(float(x), 4) for x in v]
            for k, v in jax.device_get(metrics).items()
        }
        self.clock.tick()
        verdict, why = self.faults.judge(step, values, limit, self._kept)
        if verdict != OK:
            self.bar.say(why)
            self.metrics.write("event", step, {"event": verdict, "why": why})
            self.bad_step = step
        if step % self.cfg.train.log_every and step != self.steps:
            return verdict
        rate = self.clock.rate()  # steps a second since the last record
        self.hosts.report(step=step, **self.clock.pace(rate))
        tokens, flops = (
            accounting.tokens_per_step(self.cfg),
            accounting.true_step_flops(self.cfg, step),
        )
        flops += tokens * self.objective.flops_per_token()
        values |= {
            "lr": float(self.schedule(step - 1 - self.faults.skipped(step))),
            "time_s": self.clock.total(),
            "tokens": step * tokens,
            "tokens_per_s": rate * tokens,
            "flops_per_s": rate * flops,
            "mfu": rate * flops / self.peak if self.peak else None,
        }
        self.metrics.write("train", step, values)
        self.bar.update(step, values)
        return verdict

    def _kept(self) -> str:
        with contextlib.suppress(CheckpointError):
            self.checkpoints.wait()  # one under way counts, if it succeeds
        steps = self.checkpoints.steps()
        return (
            f"the last good checkpoint is of step {steps[-1]}"
            if steps
            else "there is no checkpoint yet"
        )

    def _evaluate(self, step: int, state: TrainState) -> dict[str, Any]:
        t = self.cfg.train
        rows = t.batch_size // t.accum
        with self.goodput.during("evaluate"):
            batches = eval_batches(
                self.data.validation, rows, limit=t.eval_rows, sharding=self.batch_sharding
            )
            batches = list(batches)
            whole = self.origin.whole(state.params)
            record = evaluate(self.lm, whole, batches, self.token_bytes)
            average = None
            if state.average is not None:
                average = self.last_average = evaluate(
                    self.lm, self.origin.whole(state.average), batches, self.token_bytes
                )
            record |= self.objective.evaluate(self.lm, whole, batches)
            for name, held_out in self.data.sources:
                limit = -(-t.eval_rows // len(self.data.sources))
                own = eval_batches(held_out, rows, limit=limit, sharding=self.batch_sharding)
                found = evaluate(self.lm, whole, list(own), self.token_bytes)
                record |= {
                    f"source/{name}/{key}": found[key]
                    for key in ("causal/nll", "causal/bits_per_byte")
                }
            if self.measure is not None:
                source = self.meta.get("chat_template")
                model = Loaded(
                    self.lm,
                    whole,
                    self.data.tokenizer,
                    self.cfg,
                    step,
                    self.data.fingerprint,
                    self.mesh,
                    chat_template=source,
                )
                record |= self.measure(model)
        self.metrics.write("eval", step, record)
        self.bar.evaluation(step, record)
        if average is not None:
            self.metrics.write("eval_average", step, average)
            self.bar.say(
                f"step {step} · running mean of the weights: causal NLL {average['causal/nll']:.3f}"
            )
        self.last_eval = record
        loss = record.get("preference/loss", record["causal/nll"])
        self.best.see(step, loss, state.params, self.meta)
        return record

    def _save(self, step: int, state: TrainState, **more: Any) -> None:
        with self.goodput.during("save"):
            self.goodput.write()
            self._push()
            self.checkpoints.save(
                step,
                state,
                {
                    **self.meta,
                    "step": step,
                    "faults": self.faults.state(),
                    "best": self.best.state(),
                    **more,
                },
            )
        whole = self.checkpoints.steps()
        if whole:
            self._advise(whole[-1])
        self.metrics.write("goodput", step, self.goodput.record())
        paces = stragglers(self.hosts.reports(), self.hosts.names)
        if paces:
            self.metrics.write("hosts", step, paces)
            if paces["slow"]:
                self.bar.say(
                    f"Slower than the other hosts before they join a step: {', '.join(paces['slow'])}."
                )

    def _finish(self, state: TrainState) -> dict[str, Any]:
        """Waits for the last checkpoint, then writes the summary."""
        self.checkpoints.wait()
        # resumed after the last step
        record = self.last_eval or self._evaluate(self.ended or self.steps, state)
        self._push()
        cfg, first = self.cfg, self.hosts.rank == 0
        summary = {
            "finished": True,
            "name": cfg.name,
            "steps": self.steps,
            "seconds": self.seconds,
            **counted(cfg, self.steps, record),
            "trigram_bits_per_byte": trigram_bits_per_byte(cfg, self.data) if first else None,
            "eval": record,
            **({"eval_average": self.last_average} if self.last_average else {}),
            "best": self.best.state(),
            **({"ended_early": self.ended} if self.ended else {}),
            "goodput": self.goodput.record(),
            "lineage": self.meta.get("lineage"),
            "data": self.data.stats,
            "device": f"{mesh_device(self.mesh)}",
            "versions": versions(),
        }
        if first:
            write_text(self.workdir / "sample.txt", sample_text(self.data))
            write_json(self.workdir / "summary.json", summary)
        return summary

    def _push(self) -> None:
        """Uploads the metrics before a checkpoint, so that no checkpoint is ahead of the loss
        curve."""
        try:
            self.metrics.flush()
            self.outbox.push()
        except OSError as e:
            raise CheckpointError(
                f"the records of {self.workdir} could not be written: {reason(e)}. They are in {self.outbox.directory}; "
                "the same command goes on from the last checkpoint."
            ) from e
