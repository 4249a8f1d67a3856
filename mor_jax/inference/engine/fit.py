"""Whether a model and its lanes fit the devices of a server, from shapes alone: nothing is
allocated or compiled.

The bytes of weights and logs are those of the arrays that `Device` makes, in their shardings.
Beside them are the prefix cache, as large as the lanes' logs unless said otherwise, a lane for the
scores of prompts, and what a program works with: an estimate, `_working`. `launch.plan --serve
--compile` holds weights, state and programs against the compiler's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Sharding
from rich import box
from rich.table import Table
from rich.text import Text

from mor_jax.analysis import units
from mor_jax.analysis.topologies import Topology
from mor_jax.config import Config
from mor_jax.errors import UserError
from mor_jax.inference.engine import layers
from mor_jax.inference.engine.device import EngineConfig, check_sizes, shape_of
from mor_jax.inference.engine.layers import WeightFormat
from mor_jax.inference.engine.placement import Placement
from mor_jax.inference.engine.rows import DrawConfig
from mor_jax.inference.engine.state import Shape, empty_state
from mor_jax.model.kv import SHARED
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import AXES
from mor_jax.parallel.serving import check_tensor, sizes_that_divide, tensor_axis

FILL = 0.92  # share of a device's memory that is used: allocators lose the rest to fragmentation
FLOAT32 = 4
MOST_LANES = 4096
WORDS = {
    "weights": "weights",
    "logs": "keys and values of the lanes",
    "rows": "the rest of the lanes",
    "prefix": "prefix cache, full",
    "scores": "the lane that scores prompts",
    "working": "the largest program, about",
    "loading": "weights while they are read",
}


@dataclass(frozen=True)
class ServingMemory:
    """Bytes on each device."""

    weights: int
    logs: int  # keys and values of all lanes
    rows: int  # the rest of their state: what draws read, tokens in flight
    prefix: int  # the prefix cache when it is full
    scores: int  # the lane that scores prompts
    working: int  # of the largest program, an estimate
    loading: int  # the weights as they are read, freed before anything is cached or computed

    @property
    def total(self) -> int:
        """At the fullest moment: while loading, or while serving with a full prefix cache."""
        always = self.weights + self.logs + self.rows + self.scores
        return always + max(self.prefix + self.working, self.loading)


def serving_memory(
    lm: LM,
    config: EngineConfig,
    tensor: int = 1,
    *,
    shares: tuple[float, ...] | None = None,
    prefix_bytes: int | None = None,
    scoring: bool = True,
) -> ServingMemory:
    """What a server of this model needs, its arrays cut over `tensor` devices.

    Args:
      shares: of tokens that run each step; default: the capacities of training.
      prefix_bytes, scoring: of `service.ServiceConfig` and `build.build_service`.
    """
    check_sizes(lm, config)
    weights, loading = _weights(lm, config.weights, tensor)
    shape = shape_of(lm, config, shares or lm.policy.shares())
    logs = _logs(lm, shape, tensor)
    rows = shape.lanes * _row(lm, config.candidates, config.max_logprobs)
    ids = shape.lanes * (shape.context - 1) if lm.model.smear else 0
    rows += FLOAT32 * (sum(shape.entries) - shape.lanes + ids)
    scores = 0
    if scoring:
        most = shape.context * (1 if lm.depth.kv_name == SHARED else lm.program.recursions)
        scores = _logs(lm, Shape(shape.context, (most,)), tensor)
    prefix = logs if prefix_bytes is None else math.ceil(prefix_bytes / tensor)
    working = _working(lm, config, shape, tensor)
    return ServingMemory(weights, logs, rows, prefix, scores, working, loading)


def most_lanes(lm: LM, config: EngineConfig, tensor: int, room: float, **more: Any) -> int:
    """Lanes that fit `room` bytes a device, everything else of `config` as it is; 0: not one."""

    def fits(lanes: int) -> bool:
        c = dataclasses.replace(config, lanes=lanes)
        return serving_memory(lm, c, tensor, **more).total <= room

    low, high = 0, 1
    while high <= MOST_LANES and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def require_fit(
    lm: LM, config: EngineConfig, tensor: int, room: float, *, devices: int, **more: Any
) -> ServingMemory:
    """The memory of a server that fits `room` bytes a device.

    Raises UserError, with the numbers and what would fit, where it does not."""
    need = serving_memory(lm, config, tensor, **more)
    if need.total <= room:
        return need
    parts = ", ".join(
        f"{name} {units.size(n)}" for name, n in dataclasses.asdict(need).items() if n
    )
    raise UserError(
        f"the model does not fit with {config.lanes} lanes of {config.context or lm.model.context} tokens: each device needs "
        f"{units.size(need.total)} and has {units.size(room)} ({parts}). {_advice(lm, config, tensor, room, devices, **more)}"
    )


def _advice(
    lm: LM, config: EngineConfig, tensor: int, room: float, devices: int, **more: Any
) -> str:
    """What would fit: fewer lanes, a shorter context, int8 weights, more devices."""
    would: list[str] = []
    if lanes := most_lanes(lm, config, tensor, room, **more):
        would.append(f"--lanes {lanes}")
    context = config.context or lm.model.context
    while context > 256:
        context //= 2
        c = dataclasses.replace(config, context=context)
        if serving_memory(lm, c, tensor, **more).total <= room:
            would.append(f"--context {context}")
            break
    if config.weights != "int8":
        c = dataclasses.replace(config, weights="int8")
        if lanes := min(config.lanes, most_lanes(lm, c, tensor, room, **more)):
            fewer = f" --lanes {lanes}" if lanes < config.lanes else ""
            would.append(f"--weights int8{fewer}")
    for size in sizes_that_divide(lm.model, devices):
        if size > tensor and serving_memory(lm, config, size, **more).total <= room:
            would.append(f"--mesh tensor={size}")
            break
    if would:
        return f"This fits: {'; or '.join(would)}."
    return "Nothing of it fits these devices: take more or larger ones, or a smaller model."


@dataclass(frozen=True)
class ServingPlan:
    """A server of one model on devices one need not have."""

    config: Config
    engine: EngineConfig
    topology: Topology
    tensor: int
    memory: ServingMemory
    lanes: int  # that fit at most

    @property
    def room(self) -> float:
        """Bytes a device has for the server."""
        return FILL * self.topology.chip.memory

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.config.name,
            "topology": self.topology.name,
            "mesh": {"tensor": self.tensor},
            "engine": dataclasses.asdict(self.engine),
            "bytes": dataclasses.asdict(self.memory)
            | {"total": self.memory.total, "room": self.room},
            "lanes that fit": self.lanes,
        }


def plan_serving(
    cfg: Config, place: Topology, engine: EngineConfig, mesh: str | None = None
) -> ServingPlan:
    """The plan of a server on one slice (or node) of a topology.

    Args:
      mesh: "tensor=N"; default: the largest N that cuts the model in equal parts.
    Raises:
      UserError: no such mesh, or the model does not fit with its lanes; it says what would.
    """
    devices = place.per_slice
    if mesh is None:
        tensor = sizes_that_divide(cfg.model, devices)[-1]
    else:
        tensor = tensor_axis(mesh)
        check_tensor(mesh, tensor, cfg.model, devices)
    lm, room = LM.from_config(cfg), FILL * place.chip.memory
    memory = require_fit(lm, engine, tensor, room, devices=devices)
    return ServingPlan(cfg, engine, place, tensor, memory, most_lanes(lm, engine, tensor, room))


def serving_tables(found: ServingPlan, compiled: dict[str, Any] | None) -> list[Table | Text]:
    """What a person wants to see of a plan, in order. `compiled`: of `aot.serving_report`."""
    t, engine, context = found.topology, found.engine, found.config.model.context
    head = Text.assemble((found.config.name, "bold"), f" served on {t.name}: tensor={found.tensor}")
    head.append(f", {engine.lanes} lanes of {engine.context or context} tokens, ")
    head.append("int8 weights" if engine.weights == "int8" else found.config.model.dtype)
    needs = Table("bytes a device", "", box=box.SIMPLE)
    for name, n in dataclasses.asdict(found.memory).items():
        needs.add_row(WORDS[name], units.size(n))
    needs.add_section()
    needs.add_row("needed at the fullest moment", units.size(found.memory.total))
    needs.add_row(f"room ({FILL:.0%} of {units.size(t.chip.memory)})", units.size(found.room))
    lanes = Text(f"lanes that fit: {found.lanes}")
    if compiled is None:
        return [head, needs, lanes]
    table = Table("compiled", "seconds", "arguments", "temporary", "collectives", box=box.SIMPLE)
    for name, row in compiled.items():
        if name == "bytes":
            continue
        sent = ", ".join(
            f"{c['count']:.0f} {kind} ({units.size(c['bytes'])})"
            for kind, c in row["collectives"].items()
        )
        sizes = (units.size(row["bytes"][k]) for k in ("arguments", "temporary"))
        table.add_row(name, f"{row['seconds']['trace and compile']:.0f}", *sizes, sent or "none")
    return [head, needs, lanes, table]


def device_room() -> float | None:
    """Bytes of this machine's devices that a server may use; None: they do not say (CPUs)."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return FILL * limit if limit else None


def abstract_placement(lm: LM, tensor: int) -> Placement:
    """Where arrays would lie on so many devices, which need not exist."""
    sizes = tuple(tensor if axis == "tensor" else 1 for axis in AXES)
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Placement(mesh, lm.rules)


@functools.lru_cache(maxsize=64)
def _weights(lm: LM, weights: WeightFormat, tensor: int) -> tuple[int, int]:
    """(bytes of the weights as programs read them, of the parameters they are made from)."""
    place = abstract_placement(lm, tensor)
    params = jax.eval_shape(lm.init, jax.random.key(0))

    def prepared(weights: WeightFormat) -> tuple[Any, Any]:
        made = jax.eval_shape(lambda p: layers.prepare(lm, p, weights, flat=not place.cut), params)
        return made, place.weights(lm, made)

    of_params = place.parameters(lm)
    loading = (params, of_params) if weights == "int8" else prepared("compute")
    return _bytes(*prepared(weights)), _bytes(*loading)


@functools.lru_cache(maxsize=8)
def _row(lm: LM, candidates: int, max_logprobs: int) -> int:
    """Bytes of a lane that has room for one token, without its logs."""
    draw = DrawConfig(lm.model.vocab_size, candidates, max_logprobs)
    routers = jax.eval_shape(lm.init, jax.random.key(0))["router"]
    state = jax.eval_shape(lambda r: empty_state(lm, Shape(1, (1,)), draw, r), routers)
    return _bytes(state._replace(prelude=(), core=(), coda=()), None)


def _logs(lm: LM, shape: Shape, tensor: int) -> int:
    """Bytes of a device's part of keys and values."""
    _, kv_heads, head_dim = lm.model.dims
    entry = 2 * kv_heads // tensor * head_dim * jnp.dtype(lm.model.dtype).itemsize
    p = lm.program
    ends = shape.lanes * shape.context * (p.prelude + p.coda)
    return entry * (ends + sum(shape.entries) * p.core * p.repeat)


def _bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a device's share. `shardings`: a tree, or one for all."""
    if shardings is None or isinstance(shardings, Sharding):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def one(x: Any, s: Any) -> int:
        return math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(one, tree, shardings)))


def _working(lm: LM, config: EngineConfig, shape: Shape, tensor: int) -> int:
    """The larger of: a tick's logits, whole on every device, and what a draw makes of them, eight
    arrays of float32 in all (XLA for TPUs needs 7.2 of them for 32 lanes and 128,256 tokens); a
    prefill's widest block, its keys and values of all steps and a copy of the longest lane's log of
    a part."""
    m, c = lm.model, max(config.chunks)
    size = 2 if m.dtype == "bfloat16" else FLOAT32
    heads, kv_heads, head_dim = m.dims
    tick = 8 * FLOAT32 * shape.lanes * m.vocab_size
    steps = 1 if lm.depth.kv_name == SHARED else lm.program.recursions
    kv = 2 * kv_heads * head_dim * size // tensor
    own = (
        c
        * kv
        * (lm.program.core * lm.program.repeat * steps + lm.program.prelude + lm.program.coda)
    )
    block = c * (4 * m.width + 3 * m.mlp_width // tensor) * FLOAT32
    segment = max(s.size for s in shape.core)
    scores = 2 * FLOAT32 * (heads // tensor) * c * segment
    return max(tick, own + block + scores + kv * max(shape.entries))


__all__ = [
    "ServingMemory",
    "ServingPlan",
    "abstract_placement",
    "device_room",
    "most_lanes",
    "plan_serving",
    "require_fit",
    "serving_memory",
    "serving_tables",
]
