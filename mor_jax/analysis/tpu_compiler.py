"""XLA's compiler for TPUs on a machine without one: it comes with the package libtpu and needs
devices only described.

libtpu of another jax reads its programs wrongly or not at all, so the version is checked first. On
its own it would ask Google Cloud's metadata server which TPU this is, and wait for many minutes
where there is none; `ENVIRONMENT` answers in its place. It is read when libtpu is loaded, so it
must be set before the first use of libtpu in a process.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from mor_jax.analysis.topologies import Topology
from mor_jax.errors import UserError

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # any that exists: the topology is named when devices are described
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two processes may compile at a time
}


def quiet_without_tpu() -> None:
    """Where libtpu is installed to compile with and there is no TPU: answer what it asks when JAX
    looks for devices, or else it complains on stderr, and on a virtual machine of Google Cloud
    waits. To be called before JAX looks."""
    if not (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")):
        _answer()


def _answer() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def libtpu_wanted() -> str:
    """The requirement of this jax, e.g. "libtpu==0.0.42.*"."""
    wanted = [r for r in importlib.metadata.requires("jax") or () if re.match(r"libtpu\b", r)]
    return wanted[0].split(";")[0].strip() if wanted else "libtpu"


def require_libtpu() -> None:
    """Raise UserError where libtpu is missing or is that of another jax.

    A library that TPU_LIBRARY_PATH names is taken as it is."""
    if os.environ.get("TPU_LIBRARY_PATH"):
        return
    wanted, how = libtpu_wanted(), "No TPU is needed to compile."
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"compiling for TPUs needs libtpu: pip install '{wanted}'. {how}") from None
    prefix = wanted.partition("==")[2].removesuffix("*")
    if not f"{found}.".startswith(prefix):
        raise UserError(
            f"libtpu {found} is not the one that jax {jax.__version__} compiles with: pip install '{wanted}'. {how}"
        )


def described_tpus(place: Topology) -> Sequence[Any]:
    """The devices of a TPU topology, to compile for and for nothing else.

    Raises UserError: there is no libtpu for this jax, or it knows another number of such devices.
    """
    require_libtpu()
    _answer()
    from jax.experimental import topologies

    kind = place.name.partition("-")[0]
    more = {"chips_per_host_bounds": (1, 1, 1)} if place.per_slice == 1 else {}
    name = f"{kind}:{place.grid}"
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=place.slices, **more
    ).devices
    if len(devices) != place.devices:
        raise UserError(
            f"libtpu describes {name} as {len(devices)} devices, and {place.name} is {place.devices}."
        )
    return devices
