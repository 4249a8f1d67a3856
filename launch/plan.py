"""Will it fit, what will it send, and how should the mesh be cut: a plan for devices one does not
have.

    python -m launch.plan configs/mor.py:1.7b,nr=3 --topology v5e-256 --suggest
    python -m launch.plan configs/llama8b.py --topology v5e-256x4 --suggest --json
    python -m launch.plan configs/mor.py:360m,nr=3 --topology h100x8 --config.mesh.fsdp=8 \\
        --config.train.accum=8
    python -m launch.plan configs/mor.py:360m,nr=3 --topology v5e-8 --suggest --compile
    python -m launch.plan configs/llama8b.py:vanilla --topology v5e-8 --serve --lanes 32

From shapes alone: nothing is allocated. The plan of the configuration as it is, or with --suggest
of the mesh, the number of micro-batches and the rematerialisation that spend least time in
collectives among those that fit. What does not fit is refused, with the numbers and what would.
--compile compiles the very step: for simulated CPU devices (cpuxN), or for a TPU topology where
libtpu is installed (no TPU is needed), and prints what the compiler says.

--serve plans a server (launch.serve) on one slice instead: bytes a device, and how many lanes fit.
With --compile its tick and its largest prefill.

From a notebook:

    from mor_jax.analysis.plan import plan, suggest
    suggest(from_dict(config), topology("v5e-256")).bytes_by_kind()
"""

import json
import sys

from absl import flags
from rich.console import Console

from launch import cli
from mor_jax.analysis.compiled import against_the_plan, compiled_tables
from mor_jax.analysis.inspection import with_vocabulary
from mor_jax.analysis.plan import overrides, plan, plan_tables, require_fit, suggest
from mor_jax.analysis.roofline import report as roofline_report
from mor_jax.analysis.topologies import Topology, topology
from mor_jax.config import Config, from_dict
from mor_jax.errors import ConfigError, UserError
from mor_jax.inference.engine.device import EngineConfig
from mor_jax.inference.engine.fit import plan_serving, serving_tables

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices, e.g. v5e-8, v5e-256, v5e-256x4, h100x8.", required=True
)
_SUGGEST = flags.DEFINE_bool(
    "suggest", False, "Plan the best mesh instead of the configuration's own."
)
_COMPILE = flags.DEFINE_bool(
    "compile", False, "Also compile the step for these devices and print what it needs."
)
_LIMIT = flags.DEFINE_float(
    "compile_limit", 3600.0, "--compile for TPUs: seconds it may take at most."
)
_SERVE = flags.DEFINE_bool("serve", False, "Plan a server of this model instead of its training.")
_LANES = flags.DEFINE_integer("lanes", 8, "Of --serve: sequences decoded at once.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 0, "Of --serve: longest sequence; 0: the model's.")
_MESH = flags.DEFINE_string(
    "mesh", None, "Of --serve: tensor=N; default: as many devices as divide the model."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "compute", ["compute", "int8"], "Of --serve: see launch.serve."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.")


def main(_: list[str]) -> None:
    place = topology(_TOPOLOGY.value)
    if _CONFIG.value is None:
        raise UserError(
            "name a configuration, e.g. python -m launch.plan configs/mor.py:360m,nr=3 --topology v5e-8."
        )
    cfg, _note = with_vocabulary(from_dict(_CONFIG.value.to_dict()))
    if _SERVE.value:
        return serve(cfg, place)
    if _SUGGEST.value:
        found = suggest(cfg, place)
        if found is None:
            raise ConfigError(
                f"{cfg.name} does not fit {place.name} on any mesh, with any number of micro-batches."
            )
    else:
        found = plan(cfg, place)
        require_fit(found)
    report = found.to_dict() | {"flags": overrides(found)}
    if _COMPILE.value:
        from mor_jax.train.aot import compiled_report

        report["compiled"] = compiled_report(found.config, place, _LIMIT.value)
        report["compiled"]["against the plan"] = against_the_plan(found, report["compiled"])
        moved = found.costs(report["compiled"]["hbm"])
        report["roofline"] = roofline_report(moved, found.config.model.dtype)
    if _JSON.value:
        print(json.dumps(report, indent=1))
        return
    compiled = report.get("compiled")
    tables = plan_tables(found, compiled["hbm"] if compiled else None)
    for part in tables + (compiled_tables(found, compiled) if compiled else []):
        Console(highlight=False).print(part)
    print(report["flags"])


def serve(cfg: Config, place: Topology) -> None:
    """The plan of a server."""
    engine = EngineConfig(
        lanes=_LANES.value,
        context=_CONTEXT.value,
        weights="int8" if _WEIGHTS.value == "int8" else "compute",
    )
    found = plan_serving(cfg, place, engine, _MESH.value)
    report = found.to_dict()
    if _COMPILE.value:
        from mor_jax.train.aot import compiled_serving

        report["compiled"] = compiled_serving(cfg, place, engine, found.tensor, _LIMIT.value)
    if _JSON.value:
        print(json.dumps(report, indent=1))
        return
    for part in serving_tables(found, report.get("compiled")):
        Console(highlight=False).print(part)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--config")
    cli.run(main)
