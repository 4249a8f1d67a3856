"""Device mesh: axes `data`, `fsdp`, `sequence`, `tensor`, all of them Auto.

The order is that of the devices: neighbours first differ in `tensor`, which talks the most, last in
`data`, which talks once a step and alone may cross the network between slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mor_jax.config import MeshConfig, MeshShape, mesh_shape
from mor_jax.errors import ConfigError

AXES = MeshShape._fields


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all). One device is the 1 x 1 x 1 x 1 mesh of the same program.

    `axis_types` is explicit because `jax.make_mesh` defaults to Explicit axes, under which
    unannotated code fails. Raises ConfigError when the axes do not multiply to the number of
    devices, or the devices are not in as many slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    auto = (AxisType.Auto,) * len(AXES)
    if config.slices == 1:
        return jax.make_mesh(tuple(shape), AXES, axis_types=auto, devices=devices)
    return Mesh(arrange_slices(devices, shape, config.slices), AXES, axis_types=auto)


def arrange_slices(devices: Sequence[Any], shape: MeshShape, slices: int) -> np.ndarray:
    """Devices of several slices in mesh order: `data` runs over the slices first, every other axis
    within one.

    A slice is what the devices say (`slice_index`, TPUs); else a process, where there are as many
    of those (a GPU node each); else, of devices that say nothing, consecutive equal parts.
    Raises ConfigError when the devices are in another number of slices, or in unequal ones.
    """
    inner = shape._replace(data=shape.data // slices)
    outer = shape._replace(data=slices, fsdp=1, sequence=1, tensor=1)
    found = {getattr(d, "slice_index", None) for d in devices} - {None}
    processes = {d.process_index for d in devices}
    if len(found) <= 1 and len(processes) != slices:
        if len(found) == 1 or len(processes) > 1:
            raise ConfigError(
                f"config.mesh.slices = {slices}, but the devices are in {len(found) or 1} slice and {len(processes)} "
                "process(es). Set it to the number of slices (TPUs) or of nodes (GPUs, one process each)."
            )
        return np.array(devices).reshape(tuple(shape))
    by = "slice_index" if len(found) > 1 else "process_index"
    sizes = [
        sum(getattr(d, by) == s for d in devices) for s in sorted({getattr(d, by) for d in devices})
    ]
    if len(sizes) != slices or len(set(sizes)) != 1:
        raise ConfigError(
            f"config.mesh.slices = {slices}, but the devices are in parts of {sizes} devices by {by}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        tuple(inner), tuple(outer), devices, process_is_granule=by == "process_index"
    )


def backend() -> str:
    """The platform that is being compiled for: "cpu", "gpu" or "tpu". The mesh's in scope, which
    may be of devices that are only described, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
