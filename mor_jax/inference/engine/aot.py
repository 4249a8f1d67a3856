"""The programs of an engine compiled ahead of time, for devices that may only be described: what
`fit.py` is held against. `train/aot.py` runs it for TPUs, in a process that can be ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from mor_jax.analysis.collectives import read_collectives, summary
from mor_jax.config import Config, MeshConfig
from mor_jax.inference.engine import layers, programs
from mor_jax.inference.engine.device import PIECE, EngineConfig, check_sizes, shape_of
from mor_jax.inference.engine.placement import Placement
from mor_jax.inference.engine.rows import DrawConfig
from mor_jax.inference.engine.state import empty_state
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh


def abstract_programs(
    cfg: Config, engine: EngineConfig, tensor: int, devices: Sequence[Any]
) -> tuple[programs.Programs, Any, Any]:
    """(the programs, not compiled; shapes and places of the weights and of the state)."""
    lm = LM.from_config(cfg)
    check_sizes(lm, engine)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), list(devices)[:tensor])
    place = Placement(mesh, lm.rules)
    params = jax.eval_shape(lm.init, jax.random.key(0))
    prepared = jax.eval_shape(
        lambda p: layers.prepare(lm, p, engine.weights, flat=not place.cut), params
    )
    weights = _placed(prepared, place.weights(lm, prepared))
    shape = shape_of(lm, engine, lm.policy.shares())
    draw = DrawConfig(lm.model.vocab_size, engine.candidates, engine.max_logprobs)
    empty = jax.eval_shape(lambda r: empty_state(lm, shape, draw, r), prepared["router"])
    state = _placed(empty, place.outputs(empty))
    return programs.Programs(lm, shape, draw, weights, state, PIECE, place), weights, state


def serving_report(
    cfg: Config, engine: EngineConfig, tensor: int, devices: Sequence[Any]
) -> dict[str, Any]:
    """What the compiler says of a tick and of the largest prefill; JSON-ready: seconds, bytes of a
    device, collectives (those in loops are counted once), lines of the program."""
    made, weights, state = abstract_programs(cfg, engine, tensor, devices)
    report: dict[str, Any] = {"bytes": {"weights": _bytes(weights), "state": _bytes(state)}}
    chunk = max(min(c, cfg.model.context) for c in engine.chunks)

    def tick() -> Any:
        made.compile_tick(engine.boundary_every or cfg.model.recursions, engine.ticks_per_dispatch)
        return made.tick

    def prefill() -> Any:
        made.compile_prefills((chunk,), lambda text: None)
        return made.prefills[chunk]

    for name, compiling in (("tick", tick), (f"prefill of {chunk} tokens", prefill)):
        begun, cpu = time.perf_counter(), time.process_time()
        compiled = compiling()
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        memory, text = compiled.memory_analysis(), compiled.as_text() or ""
        assert memory is not None, "every backend of ours has one"
        found = read_collectives(text, {"tensor": tensor} if tensor > 1 else {})
        report[name] = {
            "seconds": {"trace and compile": seconds, "cpu": cpu},
            "lines": text.count("\n"),
            "bytes": {
                "arguments": memory.argument_size_in_bytes,
                # The state is donated: its outputs lie where its inputs did.
                "outputs beside": memory.output_size_in_bytes - memory.alias_size_in_bytes,
                "temporary": memory.temp_size_in_bytes,
            },
            "collectives": summary(found),
        }
    return report


def _placed(tree: Any, shardings: Any) -> Any:
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _bytes(tree: Any) -> int:
    """Of a device's share."""

    def one(x: jax.ShapeDtypeStruct) -> int:
        assert isinstance(x.sharding, NamedSharding)
        local = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        return local.size * local.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


__all__ = ["abstract_programs", "serving_report"]
