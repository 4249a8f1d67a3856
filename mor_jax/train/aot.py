"""The training step compiled ahead of time, for devices that may only be described: what a plan is
held against.

`compiled_reports` compiles for TPUs in a process of its own, which is ended when it takes longer
than it may: neither libtpu nor its compiler can be interrupted from Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mor_jax.analysis.collectives import read_collectives, summary
from mor_jax.analysis.hbm import traffic
from mor_jax.analysis.topologies import Topology, topology
from mor_jax.analysis.tpu_compiler import ENVIRONMENT, described_tpus, require_libtpu
from mor_jax.config import Config, from_dict, saved_config
from mor_jax.errors import ConfigError, UserError
from mor_jax.inference.engine.aot import serving_report
from mor_jax.inference.engine.device import EngineConfig
from mor_jax.model.adapter import Adapters
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.distill import COMPUTED_ALIKE, Teacher
from mor_jax.train.objective import NEXT_TOKEN
from mor_jax.train.preference import Reference
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import abstract_params, abstract_state
from mor_jax.train.step import make_train_step

# seconds to load libtpu and describe devices; it takes less than one where nothing is wrong
DESCRIBED_WITHIN = 120.0


def described_devices(place: Topology) -> Sequence[Any]:
    """Devices to compile for: simulated ones, this machine's, or a description of TPUs (libtpu
    compiles for them).

    Raises UserError where there is none of these.
    """
    if place.is_tpu:
        return described_tpus(place)
    if jax.device_count() != place.devices:
        raise UserError(
            f"{place.name} is {place.devices} devices and there are {jax.device_count()}. For simulated ones set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={place.devices} and JAX_PLATFORMS=cpu."
        )
    return jax.devices()


def lower_step(cfg: Config, devices: Sequence[Any]) -> tuple[jax.stages.Lowered, jax.sharding.Mesh]:
    """The training step of a configuration for these devices, as it is written; nothing is
    allocated.

    Raises ConfigError: `vocab_size` is still 0, or the mesh does not fit the devices.
    """
    if not cfg.model.vocab_size:
        raise ConfigError(
            "config.model.vocab_size is 0, i.e. left to the tokenizer; give it to compile the step."
        )
    mesh, lm = make_mesh(cfg.mesh, devices), LM.from_config(cfg)
    tx = optimizer_of(cfg, max(cfg.train.steps, 1))
    rows = NamedSharding(mesh, lm.rules.spec(("batch", "time")))
    one = jax.ShapeDtypeStruct((cfg.train.batch_size, cfg.model.context), jnp.int32, sharding=rows)
    # Outside of the mesh's scope: optax computes a little, which devices that are only described
    # cannot.
    adapters = Adapters(lm, cfg.adapter) if cfg.adapter.rank else None
    state = abstract_state(adapters or lm, tx, mesh, bool(cfg.optim.ema))
    objective, beside = NEXT_TOKEN, {}
    if adapters:
        beside["base"] = abstract_params(lm, mesh)
    if cfg.data.format == "preference":
        objective = Reference(lm, None, cfg.preference.beta)
        beside["teacher"] = abstract_params(lm, mesh)
    elif cfg.distill.weight:
        source = saved_config(cfg.distill.teacher)
        # How it is computed is the run's choice, as in `load_teacher`.
        of_run = {name: getattr(cfg.model, name) for name in COMPUTED_ALIKE}
        model = dataclasses.replace(source.model, remat="none", **of_run)
        d = cfg.distill
        teacher = LM(model, source.depth, lm.rules)
        objective = Teacher(teacher, None, d.weight, d.temperature)
        beside["teacher"] = abstract_params(teacher, mesh)
    step = make_train_step(
        lm, tx, cfg.train.accum, None, objective, ema=cfg.optim.ema, adapters=adapters
    )
    with jax.set_mesh(mesh):
        batch = {"tokens": one, "segment_ids": one}
        if cfg.data.conversations:
            batch["weights"] = jax.ShapeDtypeStruct(one.shape, jnp.float32, sharding=rows)
        return jax.jit(step, donate_argnums=0).lower(state, batch, None, beside), mesh


def compile_step(
    cfg: Config, devices: Sequence[Any]
) -> tuple[jax.stages.Compiled, jax.sharding.Mesh]:
    """`lower_step`, compiled."""
    lowered, mesh = lower_step(cfg, devices)
    with jax.set_mesh(mesh):
        return lowered.compile(), mesh


def step_report(cfg: Config, devices: Sequence[Any]) -> dict[str, Any]:
    """What the compiler says of a step; JSON-ready. Bytes of a device, collectives of an optimiser
    step in and out of loops, bytes between a device and its memory, seconds to trace and to compile
    (of the clock and of all processors), lines of the program."""
    begun = time.perf_counter()
    lowered, mesh = lower_step(cfg, devices)
    traced, cpu = time.perf_counter(), time.process_time()
    with jax.set_mesh(mesh):
        compiled = lowered.compile()
    done, cpu = time.perf_counter(), time.process_time() - cpu
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None, "every backend of ours has one"
    found = read_collectives(text, dict(mesh.shape))
    return {
        "seconds": {"trace": traced - begun, "compile": done - traced, "compile_cpu": cpu},
        "lines": {"written": lowered.as_text().count("\n"), "compiled": text.count("\n")},
        "bytes": {
            "state and batch": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "total": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        },
        "hbm": traffic(text),
        "collectives": summary(found),
        "in loops": summary(c for c in found if c.in_loop),
    }


def compiled_report(cfg: Config, place: Topology, limit_s: float = 3600.0) -> dict[str, Any]:
    """`step_report` on a topology. For TPUs in a process of its own, `limit_s` seconds at most.

    Raises UserError: there are no such devices, libtpu is missing or of another jax, or the
    compiler gave up, was killed, or did not end in time.
    """
    if not place.is_tpu:
        return step_report(cfg, described_devices(place))
    (report,) = compiled_reports([(cfg, place)], limit_s)
    if "error" in report:
        raise UserError(f"{cfg.name} was not compiled for {place.name}: {report['error']}")
    return report


def compiled_serving(
    cfg: Config, place: Topology, engine: EngineConfig, tensor: int, limit_s: float = 3600.0
) -> dict[str, Any]:
    """`serving_report` on the first `tensor` devices of a topology. Args and errors as in
    `compiled_report`."""
    if not place.is_tpu:
        return serving_report(cfg, engine, tensor, described_devices(place))
    require_libtpu()
    serve = {"engine": dataclasses.asdict(engine), "tensor": tensor}
    case = {"config": cfg.to_dict(), "topology": place.name, "serve": serve}
    (report,) = _compiled_until_one_fails([case], limit_s)
    if "error" in report:
        raise UserError(
            f"the engine of {cfg.name} was not compiled for {place.name}: {report['error']}"
        )
    return report


def compiled_reports(
    cases: Sequence[tuple[Config, Topology]], limit_s: float
) -> Iterator[dict[str, Any]]:
    """`step_report` of each configuration on each TPU topology, in order, or {"error": what went
    wrong}.

    One process compiles them, one after another; it is started anew after one that took longer than
    `limit_s` seconds or took the process with it. Raises UserError where libtpu is missing or of
    another jax.
    """
    require_libtpu()
    left = [{"config": cfg.to_dict(), "topology": place.name} for cfg, place in cases]
    while left:
        for report in _compiled_until_one_fails(left, limit_s):
            left = left[1:]
            yield report


def _compiled_until_one_fails(
    cases: list[dict[str, Any]], limit_s: float
) -> Iterator[dict[str, Any]]:
    # The cache would answer in place of the compiler; and no device of this machine has a part in
    # it.
    env = (
        os.environ | ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    )
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "mor_jax.train.aot"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=env,
            bufsize=0,
        )
        stdin, stdout = child.stdin, child.stdout
        assert stdin is not None and stdout is not None, "pipes"
        try:
            # it has ended already; its last words are read below
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(cases).encode())
                stdin.close()
            for _ in cases:
                ready, _, _ = select.select([stdout], [], [], limit_s)
                if not ready:
                    yield {"error": f"the compiler did not end within {limit_s:g} s."}
                    return
                line = stdout.readline()
                if not line:
                    child.wait()
                    errors.seek(0)
                    said = errors.read().decode(errors="replace").strip().splitlines()[-12:]
                    yield {
                        "error": f"the compiler ended with status {child.returncode}:\n"
                        + "\n".join(said)
                    }
                    return
                yield json.loads(line)
        finally:
            child.kill()
            child.wait()
            stdout.close()


def main() -> None:
    """Cases from the standard input, a line of JSON for each to the standard output; libtpu may
    print there, too."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for case in json.load(sys.stdin):
        try:
            faulthandler.dump_traceback_later(DESCRIBED_WITHIN, exit=True)
            devices = described_devices(topology(case["topology"]))
            faulthandler.cancel_dump_traceback_later()
            cfg = from_dict(case["config"])
            if serve := case.get("serve"):
                engine = EngineConfig(**serve["engine"])
                report = serving_report(cfg, engine, serve["tensor"], devices)
            else:
                report = step_report(cfg, devices)
        except (UserError, jax.errors.JaxRuntimeError) as error:
            report = {"error": str(error)}
        print(json.dumps(report), file=out, flush=True)


if __name__ == "__main__":
    main()
