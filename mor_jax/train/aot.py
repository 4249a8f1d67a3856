"""The training step compiled ahead of time, for devices that may only be described: what a plan is held against."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mor_jax.analysis.collectives import read_collectives, summary
from mor_jax.analysis.topologies import Topology
from mor_jax.config import Config
from mor_jax.errors import ConfigError, UserError
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.schedule import optimizer_of
from mor_jax.train.state import abstract_state
from mor_jax.train.step import make_train_step


def described_devices(place: Topology) -> Sequence[Any]:
    """Devices to compile for: simulated ones, this machine's, or a description of TPUs (libtpu compiles for them).

    Raises UserError where there is none of these.
    """
    if place.is_tpu:
        if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
            raise UserError(f"compiling for {place.name} needs libtpu: pip install libtpu. No TPU is needed.")
        from jax.experimental import topologies

        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask about
        kind = place.name.partition("-")[0]
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{place.grid}", num_slices=place.slices
        ).devices  # fmt: skip
    if jax.device_count() != place.devices:
        raise UserError(
            f"{place.name} is {place.devices} devices and there are {jax.device_count()}. For simulated ones set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={place.devices} and JAX_PLATFORMS=cpu."
        )
    return jax.devices()


def compile_step(cfg: Config, devices: Sequence[Any]) -> tuple[jax.stages.Compiled, jax.sharding.Mesh]:
    """The training step of a configuration on these devices, compiled; nothing is allocated.

    Raises ConfigError: `vocab_size` is still 0, or the mesh does not fit the devices.
    """
    if not cfg.model.vocab_size:
        raise ConfigError("config.model.vocab_size is 0, i.e. left to the tokenizer; give it to compile the step.")
    mesh, lm = make_mesh(cfg.mesh, devices), LM.from_config(cfg)
    tx = optimizer_of(cfg, max(cfg.train.steps, 1))
    rows = NamedSharding(mesh, lm.rules.spec(("batch", "time")))
    one = jax.ShapeDtypeStruct((cfg.train.batch_size, cfg.model.context), jnp.int32, sharding=rows)
    # Outside of the mesh's scope: optax computes a little, which devices that are only described cannot.
    state = abstract_state(lm, tx, mesh)
    step = jax.jit(make_train_step(lm, tx, cfg.train.accum), donate_argnums=0)
    with jax.set_mesh(mesh):
        return step.lower(state, {"tokens": one, "segment_ids": one}).compile(), mesh


def compiled_report(cfg: Config, place: Topology) -> dict[str, Any]:
    """Bytes a device and collectives a step, as the compiler says; JSON-ready."""
    compiled, mesh = compile_step(cfg, described_devices(place))
    memory = compiled.memory_analysis()
    return {
        "bytes": {
            "state and batch": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "total": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        },
        "collectives": summary(read_collectives(compiled.as_text(), dict(mesh.shape))),
    }
