"""What a planner has to know about machines: how many devices, how much memory, which links.

Names are those people use. TPUs: `v5e-256` (chips; `v5p-128` counts cores, two a chip, as Google
does), `v5e-256x4` four such slices. GPUs: `h100x8` eight of them in one node of eight, `h100x64`
eight nodes. `cpux8`: simulated devices.

Memory is what a program may use of the chip's (a TPU keeps about a quarter of a GiB, CUDA and
cuBLAS about 3 GiB a GPU). Link rates are one way and per device, from the vendors' data sheets;
plans use them for orders of magnitude only.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from mor_jax.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One kind of device. `kind`: the name `analysis.peaks` knows; rates in bytes a second."""

    kind: str
    memory: float  # bytes a program may use
    hbm: float  # between the device and its memory
    ici: float  # to the other devices of its slice or node
    dcn: float  # to other slices or nodes
    slice_limit: int  # devices that `ici` joins at most
    gke: str = ""  # value of cloud.google.com/gke-tpu-accelerator, or of gke-accelerator for a GPU


CHIPS = {
    "v4": Chip("TPU v4", 31.75 * GIB, 1228e9, 150e9, 6e9, 4096, "tpu-v4-podslice"),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 819e9, 100e9, 6e9, 256, "tpu-v5-lite-podslice"),
    "v5p": Chip("TPU v5p", 95.0 * GIB, 2765e9, 300e9, 6e9, 8960, "tpu-v5p-slice"),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 1640e9, 224e9, 12e9, 256, "tpu-v6e-slice"),
    "a100": Chip("A100", 77.0 * GIB, 2039e9, 300e9, 25e9, 8, "nvidia-a100-80gb"),
    "h100": Chip("H100", 77.0 * GIB, 3350e9, 450e9, 50e9, 8, "nvidia-h100-80gb"),
    "h200": Chip("H200", 138.0 * GIB, 4800e9, 450e9, 50e9, 8, "nvidia-h200-141gb"),
    "b200": Chip("B200", 177.0 * GIB, 8000e9, 900e9, 50e9, 8, "nvidia-b200"),
    "cpu": Chip("CPU", 2.0 * GIB, 40e9, 10e9, 1e9, 1 << 20),
}
_CORES = ("v4", "v5p")  # TPUs that are named after their cores
# Two-dimensional slices of v5e and v6e, by chips.
GRIDS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@dataclass(frozen=True)
class Topology:
    """`slices` groups of `devices // slices` devices each; links within one are `chip.ici`, between
    them `chip.dcn`."""

    name: str
    chip: Chip
    devices: int
    slices: int = 1

    @property
    def per_slice(self) -> int:
        return self.devices // self.slices

    @property
    def is_tpu(self) -> bool:
        return self.chip.kind.startswith("TPU")

    @property
    def backend(self) -> str:
        """What JAX calls such devices: "tpu", "gpu" or "cpu"."""
        return "tpu" if self.is_tpu else "cpu" if self.chip.kind == "CPU" else "gpu"

    @property
    def hosts_per_slice(self) -> int:
        """Machines, each a process. TPU slices of up to 8 chips (v4, v5p: 4) are one machine,
        larger ones have 4 chips a machine."""
        if not self.is_tpu:
            return 1
        return 1 if self.per_slice <= (8 if self._flat else 4) else self.per_slice // 4

    @property
    def grid(self) -> str:
        """The slice's shape as Google Cloud writes it, e.g. "16x16"; TPUs only.

        Raises ConfigError for a number of chips that is no shape of a slice."""
        shape = GRIDS.get(self.per_slice) if self._flat else _cuboid(self.per_slice)
        if shape is None:
            raise ConfigError(
                f"{self.name}: there is no slice of {self.per_slice} chips of {self.chip.kind}."
            )
        return shape

    @property
    def _flat(self) -> bool:
        return self.chip.kind in ("TPU v5e", "TPU v6e")


def topology(name: str) -> Topology:
    """A topology by its name (module docstring). Raises ConfigError for one that does not exist."""
    text = name.strip().lower()
    found = re.fullmatch(r"(v\d\w*)-(\d+)(?:x(\d+))?", text)
    if found and found[1] in CHIPS:
        chip, count, slices = CHIPS[found[1]], int(found[2]), int(found[3] or 1)
        each = count // 2 if found[1] in _CORES else count
        if each < 1 or slices < 1 or each > chip.slice_limit:
            raise ConfigError(
                f"topology {name!r}: a slice of {chip.kind} has 1 to {chip.slice_limit} chips; more of them are several "
                f"slices, e.g. {found[1]}-256x{max(2, each // 256)}."
            )
        made = Topology(text, chip, each * slices, slices)
        made.grid  # noqa: B018 - refuses numbers of chips that are no slice
        return made
    found = re.fullmatch(r"([abh]\d+|cpu)x(\d+)", text)
    if found and found[1] in CHIPS and int(found[2]) > 0:
        chip, count = CHIPS[found[1]], int(found[2])
        if count > chip.slice_limit and count % chip.slice_limit:
            raise ConfigError(
                f"topology {name!r}: nodes have {chip.slice_limit} devices, so give a multiple of that."
            )
        return Topology(text, chip, count, max(1, count // chip.slice_limit))
    examples = [
        "v5e-8",
        "v5e-256",
        "v5e-256x4",
        "v5p-128",
        "v6e-256",
        "h100x8",
        "h100x64",
        "h200x8",
        "a100x8",
        "cpux8",
    ]
    near = difflib.get_close_matches(text, examples, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no topology {name!r}.{hint} Examples: {', '.join(examples)}.")


def _cuboid(chips: int) -> str | None:
    """The most cubic a x b x c of powers of two with this many chips."""
    if chips < 4 or chips & (chips - 1):
        return None
    sides, i = [1, 1, 1], 2
    while sides[0] * sides[1] * sides[2] < chips:
        sides[i] *= 2
        i = (i - 1) % 3
    return "x".join(map(str, sorted(sides)))
