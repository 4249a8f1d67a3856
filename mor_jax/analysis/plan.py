"""A plan of a training run on devices one does not have: bytes a device, collectives a step, a mesh
that fits.

Everything follows from shapes: parameters from `eval_shape`, their shards from the rule table on an
abstract mesh, the rest from `analysis/memory.py` and `analysis/collective_plan.py`. Nothing is
allocated or compiled, so a plan for a thousand devices takes a second anywhere. `train/aot.py`
compiles the same step to check it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mor_jax.analysis import units
from mor_jax.analysis.accounting import true_training_flops
from mor_jax.analysis.collective_plan import Planned, planned_collectives
from mor_jax.analysis.memory import TrainingMemory, parameter_bytes, training_memory
from mor_jax.analysis.peaks import peak_flops
from mor_jax.analysis.roofline import Cost, costs, report, roofline_table
from mor_jax.analysis.topologies import Topology
from mor_jax.config import Config, MeshConfig, MeshShape, check, mesh_shape
from mor_jax.errors import ConfigError
from mor_jax.nn.attention import choose

# share of a device's memory that a plan may use: allocators lose the rest to fragmentation
FILL = 0.92
# rematerialisation, each needs less memory than the one before
LEANER = ("none", "dots", "dots_no_batch", "block")
LANES = 128  # values in a row of a TPU's vector register
# of the time of computation; a plan's share of time in collectives is no better than this
MFU = 0.4


@dataclass(frozen=True)
class Plan:
    """One configuration on one topology; bytes and seconds per device and optimiser step."""

    config: Config
    topology: Topology
    mesh: MeshShape
    memory: TrainingMemory
    collectives: tuple[Planned, ...]
    compute_s: float

    @property
    def room(self) -> float:
        """Bytes a device has for the run."""
        return FILL * self.topology.chip.memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def ici_s(self) -> float:
        """Seconds the links within a slice need, one collective after another."""
        return sum(p.bytes for p in self.collectives if not p.dcn) / self.topology.chip.ici

    @property
    def dcn_s(self) -> float:
        """Seconds the network between slices needs. Each device sends its shard's reduction across
        once: 2 (s - 1) / s of it, where the ring of the whole axis counts 2 (n - 1) / n."""
        s, n = self.config.mesh.slices, self.mesh.data
        share = ((s - 1) / s) / ((n - 1) / n) if n > 1 else 0.0
        return share * sum(p.bytes for p in self.collectives if p.dcn) / self.topology.chip.dcn

    @property
    def collective_s(self) -> float:
        return self.ici_s + self.dcn_s

    def costs(self, compiled_bytes: float | None = None) -> tuple[Cost, ...]:
        """What the step, a prefill and a decode tick cost a device (`roofline.costs`)."""
        devices = self.topology.devices
        return costs(self.config, devices=devices, compiled_bytes=compiled_bytes)

    @property
    def narrow(self) -> bool:
        """Whether a TPU's shard of a matrix is narrower than a vector register. Gathers of such
        shards turn every matrix around, in memory and in programs of many times the size."""
        return self.topology.is_tpu and self.config.model.width < LANES * self.mesh.fsdp

    def bytes_by_kind(self) -> dict[str, float]:
        """What a device holds at the fullest moment of a step."""
        m = self.memory
        return {**m.held, **m.parts[m.fullest]}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.config.name,
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "mesh": self.mesh._asdict() | {"slices": self.config.mesh.slices},
            "accum": self.config.train.accum,
            "remat": self.config.model.remat,
            "dtype": self.config.model.dtype,
            "bytes": self.bytes_by_kind() | {"total": self.memory.total, "room": self.room},
            "fits": self.fits,
            "collectives": [dataclasses.asdict(p) for p in self.collectives],
            "seconds": {"compute": self.compute_s, "ici": self.ici_s, "dcn": self.dcn_s},
            "roofline": report(self.costs(), self.config.model.dtype),
        }


def plan(cfg: Config, topology: Topology) -> Plan:
    """The plan of a configuration as it is.

    Raises ConfigError: its mesh does not fit the number of devices, something in it does not
    divide, or its attention cannot run on them.
    """
    if topology.slices > 1 and cfg.mesh.slices == 1:
        cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, slices=topology.slices))
    check(cfg, devices=topology.devices)
    cfg = with_attention(cfg, topology)
    mesh = mesh_shape(cfg.mesh, topology.devices)
    state = parameter_bytes(cfg, mesh)
    memory = training_memory(cfg, devices=topology.devices, state=state, backend=topology.backend)
    peak = (
        peak_flops(topology.chip.kind, cfg.model.dtype)
        or peak_flops(topology.chip.kind, "bfloat16")
        or 1e11
    )
    seconds = true_training_flops(cfg, 1) / (topology.devices * peak * MFU)
    collectives = tuple(planned_collectives(cfg, devices=topology.devices))
    return Plan(cfg, topology, mesh, memory, collectives, seconds)


def with_attention(cfg: Config, topology: Topology) -> Config:
    """With the attention that the step would run there in place of "auto". Raises ConfigError for
    one that cannot."""
    m = cfg.model
    attention = choose(m.attention, topology.backend, m.dtype, m.dims[2])
    return dataclasses.replace(cfg, model=dataclasses.replace(m, attention=attention))


def suggest(cfg: Config, topology: Topology) -> Plan | None:
    """The plan of the mesh (and, where the batch forces it, number of micro-batches or
    rematerialisation) that spends least time in collectives among those that fit; on TPUs among
    those whose shards fill a register, if there is one (`Plan.narrow`). None when none fits. Raises
    ConfigError: its attention cannot run there."""
    cfg = with_attention(cfg, topology)
    for remat in LEANER[LEANER.index(cfg.model.remat) :]:
        model = dataclasses.replace(cfg.model, remat=remat)
        found = [p for p in _candidates(dataclasses.replace(cfg, model=model), topology) if p.fits]
        if found:
            # Fewer micro-batches and fewer axes at equal cost.
            def key(p: Plan) -> tuple[bool, float, int, int]:
                return (
                    p.narrow,
                    round(p.collective_s, 4),
                    p.config.train.accum,
                    sum(n > 1 for n in p.mesh),
                )

            return min(found, key=key)
    return None


def _candidates(cfg: Config, topology: Topology) -> Iterator[Plan]:
    """Plans of all meshes that pass the checks: tensor within 8 neighbours, the fewest
    micro-batches that fit."""
    for sequence in (1, 2, 4, 8):
        for tensor in (1, 2, 4, 8):
            rest = topology.per_slice // (sequence * tensor)
            if rest * sequence * tensor != topology.per_slice:
                continue
            for fsdp in (f for f in range(1, rest + 1) if rest % f == 0):
                data = rest // fsdp * topology.slices
                mesh = MeshConfig(data, fsdp, tensor, sequence, topology.slices, cfg.mesh.rules)
                yield from _smallest_accum(dataclasses.replace(cfg, mesh=mesh), topology)


def _smallest_accum(cfg: Config, topology: Topology) -> Iterator[Plan]:
    for accum in (a for a in range(1, cfg.train.batch_size + 1) if cfg.train.batch_size % a == 0):
        try:
            found = plan(
                dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accum=accum)),
                topology,
            )
        except ConfigError:
            if accum > 1:  # more micro-batches divide no better
                return
            continue
        if found.fits or accum == cfg.train.batch_size:
            yield found
            return


def require_fit(found: Plan) -> None:
    """Raise ConfigError, with the numbers and what would fit, for a plan that does not."""
    if found.fits:
        return
    parts = ", ".join(f"{kind} {units.size(n)}" for kind, n in found.bytes_by_kind().items())
    better = suggest(found.config, found.topology)
    advice = (
        f"This fits: {overrides(better)} ({units.size(better.memory.total)})."
        if better
        else "No mesh, number of micro-batches or rematerialisation makes it fit; take more devices, larger ones, or a "
        "smaller model."
    )
    raise ConfigError(
        f"{found.config.name} does not fit {found.topology.name}: each device needs {units.size(found.memory.total)} "
        f"and has {units.size(found.room)} ({parts}). {advice}"
    )


def overrides(found: Plan) -> str:
    """The flags that turn a configuration into this plan's."""
    m = found.config.mesh
    fields = {
        "data": m.data,
        "fsdp": m.fsdp,
        "tensor": m.tensor,
        "sequence": m.sequence,
        "slices": m.slices,
    }
    flags = [f"--config.mesh.{k}={v}" for k, v in fields.items() if v > 1 or k in ("data", "fsdp")]
    flags.append(f"--config.train.accum={found.config.train.accum}")
    return " ".join([*flags, f"--config.model.remat={found.config.model.remat}"])


def plan_tables(found: Plan, compiled_bytes: float | None = None) -> list[Table | Text]:
    """What a person wants to see of a plan, in order. `compiled_bytes`: HBM traffic of the compiled
    step, if it was compiled."""
    t, chip = found.topology, found.topology.chip
    mesh = " x ".join(f"{axis} {n}" for axis, n in found.mesh._asdict().items())
    head = Text.assemble(
        (found.config.name, "bold"),
        f"  on {t.name}: {t.devices} x {chip.kind}, {t.slices} slice(s)\n",
    )
    head.append(
        f"mesh {mesh}, {found.config.train.accum} micro-batch(es), remat {found.config.model.remat}, "
    )
    head.append(f"attention {found.config.model.attention}")
    needs = Table("bytes a device", "", title=None, box=box.SIMPLE)
    for kind, n in found.bytes_by_kind().items():
        needs.add_row(kind, units.size(n))
    needs.add_section()
    needs.add_row("needed", units.size(found.memory.total))
    needs.add_row(f"room ({FILL:.0%} of {units.size(chip.memory)})", units.size(found.room))
    traffic = Table(
        "collectives a step", "kind", "over", "times", "bytes a device", "links", box=box.SIMPLE
    )
    for p in found.collectives:
        links = "DCN" if p.dcn else "ICI"
        traffic.add_row(p.what, p.kind, "+".join(p.axes), str(p.count), units.size(p.bytes), links)
    time = Text(f"seconds a step: {found.compute_s:.3g} of computation at {MFU:.0%} of peak, ")
    time.append(
        f"{found.ici_s:.3g} of collectives within slices, {found.dcn_s:.3g} between them if nothing overlaps"
    )
    bounds = roofline_table(found.costs(compiled_bytes), found.config.model.dtype)
    return [head, needs, traffic, time, bounds]
