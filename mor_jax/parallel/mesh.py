"""Device mesh: axes `data`, `fsdp`, `tensor`, all of them Auto."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh

from mor_jax.config import MeshConfig, mesh_shape

AXES = ("data", "fsdp", "tensor")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all). One device is the 1 x 1 x 1 mesh of the same program.

    `axis_types` is explicit because `jax.make_mesh` defaults to Explicit axes, under which unannotated code fails.
    Raises ConfigError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
