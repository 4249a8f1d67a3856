"""The shape of the device mesh, and what it must divide."""

from __future__ import annotations

import math
from typing import NamedTuple

from mor_jax.config.config import Config
from mor_jax.config.fields import MeshConfig
from mor_jax.config.refusals import nearest_multiples
from mor_jax.errors import ConfigError


class MeshShape(NamedTuple):
    """Sizes of the mesh axes in device order: neighbours first differ in `tensor`, which talks the
    most."""

    data: int
    fsdp: int
    sequence: int
    tensor: int


def mesh_shape(mesh: MeshConfig, devices: int) -> MeshShape:
    """The axes with -1 replaced. Raises ConfigError when the product is not `devices`."""
    sizes = [mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor]
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise ConfigError(
            f"config.mesh axes must be positive, at most one of them -1; got data, fsdp, sequence, tensor = {sizes}."
        )
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        if devices % known:
            raise ConfigError(
                f"config.mesh: {devices} devices cannot be divided by the given axes (product {known})."
            )
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise ConfigError(
            f"config.mesh data x fsdp x sequence x tensor = {' x '.join(map(str, sizes))} = {math.prod(sizes)}, "
            f"but there are {devices} devices."
        )
    if mesh.slices < 1 or sizes[0] % mesh.slices:
        raise ConfigError(
            f"config.mesh.slices = {mesh.slices} does not divide config.mesh.data = {sizes[0]}: slices are joined along "
            "data alone, since only gradients may cross the slow network between them."
        )
    return MeshShape(*sizes)


def check_mesh(cfg: Config, devices: int) -> None:
    data, fsdp, sequence, tensor = mesh_shape(cfg.mesh, devices)
    rows = cfg.train.batch_size // cfg.train.accum
    if rows % (data * fsdp):
        raise ConfigError(
            f"config.train.batch_size / accum = {rows} rows a micro-batch cannot be divided over data x fsdp = {data * fsdp} "
            f"devices; batch sizes near it that can: {nearest_multiples(cfg.train.batch_size, data * fsdp * cfg.train.accum)}; "
            f"data x fsdp that can: {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}."
        )
    m = cfg.model
    if m.context % sequence:
        raise ConfigError(
            f"config.model.context = {m.context} is not divisible by config.mesh.sequence = {sequence}; rows are cut "
            "along time in equal parts."
        )
    if m.width % fsdp:
        raise ConfigError(
            f"config.model.width = {m.width} is not divisible by config.mesh.fsdp = {fsdp}."
        )
    for name, value in (
        ("kv_heads", m.kv_heads),
        ("mlp_width", m.mlp_width),
        ("vocab_size", m.vocab_size),
    ):
        if value % tensor:
            raise ConfigError(
                f"config.model.{name} = {value} is not divisible by config.mesh.tensor = {tensor}."
            )
