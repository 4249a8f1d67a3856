"""The planner against the compiler: bytes a device, predicted and as XLA reports them, for programs
of every kind.

    python -m benchmarks.plan_accuracy
    python -m benchmarks.plan_accuracy --only token --json

Eight simulated devices. Each program is compiled and not run; what it needs is what
`memory_analysis()` says of its arguments and temporaries, and the plan that of XLA for CPUs
(`merged` in mor_jax/analysis/memory.py). All compute in float32: in bfloat16 that compiler keeps
float32 copies beside (a quarter more, in one program that was looked at). Exits with 1 if a plan is
further off than `--within`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

# Another width, context, vocabulary, number of layers and batch from one to the next, so that no
# constant fits by chance.
SHAPE = dict(
    width=256, heads=4, kv_heads=4, mlp_width=704, context=64, vocab_size=1024, loss_chunk=32
)
SMALL = SHAPE | dict(width=128, mlp_width=352, context=256, vocab_size=512)
LONG = SHAPE | dict(
    width=192, heads=6, kv_heads=2, mlp_width=512, context=512, vocab_size=256, loss_chunk=128
)
PLAIN = dict(layers=4, recursions=1)
TIED = dict(layers=4, recursions=3, sharing="cycle", prelude=1)
DEEP = dict(layers=8, recursions=2, sharing="middle_cycle")
MOR, TOKEN = dict(policy="expert_choice"), dict(policy="token_choice", buckets=1)
SHARED = MOR | dict(kv="shared")
CASES: dict[str, tuple[dict, dict, tuple[int, ...], dict]] = {
    # name: (model, depth, mesh (data, fsdp, tensor, sequence), train)
    "vanilla, data": (SHAPE | PLAIN, {}, (8, 1, 1), {}),
    "vanilla, long rows, data": (LONG | PLAIN, {}, (8, 1, 1), dict(batch_size=16)),
    "vanilla, long rows, fsdp": (LONG | PLAIN, {}, (1, 8, 1), {}),
    "vanilla, fsdp and tensor": (SHAPE | PLAIN, {}, (1, 2, 4), dict(batch_size=16)),
    "mor, data": (SMALL | TIED, MOR, (8, 1, 1), {}),
    "mor, fsdp, two rows a device": (SHAPE | TIED, MOR, (1, 8, 1), dict(batch_size=16)),
    "mor, fsdp and tensor": (SMALL | TIED, MOR, (1, 2, 4), {}),
    "mor, middle cycle, accum 4": (SMALL | DEEP, MOR, (1, 8, 1), dict(batch_size=32, accum=4)),
    "mor, shared keys": (LONG | TIED, SHARED, (2, 4, 1), {}),
    "mor, sequence": (LONG | TIED, MOR, (1, 4, 1, 2), {}),
    "mor, sequence and tensor": (SMALL | TIED, MOR, (1, 2, 2, 2), {}),
    "token, data": (SMALL | TIED, TOKEN, (8, 1, 1), {}),
    "token, fsdp": (LONG | TIED, TOKEN, (1, 8, 1), {}),
    "token, all axes": (SHAPE | TIED, TOKEN, (2, 2, 2), dict(batch_size=16)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="programs whose name has one of these in it"
    )
    parser.add_argument("--within", type=float, default=0.10, help="how far off a plan may be")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a program, with the parts of the plan"
    )
    args = parser.parse_args()
    # The second flag is about machine code alone, which never runs here.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not args.json:
        print(
            "| program | data x fsdp x tensor (x sequence) | planned | compiled | off |\n|---|---|---:|---:|---:|"
        )
    worst = 0.0
    for name in (n for n in CASES if any(part in n for part in args.only)):
        found = measure(name)
        worst = max(worst, abs(found["off"]))
        print(json.dumps(found) if args.json else _row(found), flush=True)
    sys.exit(worst > args.within)


def config(name: str) -> Any:
    """The configuration of a program."""
    from mor_jax.config import Config, DepthConfig, MeshConfig, ModelConfig, TrainConfig

    model, depth, mesh, train = CASES[name]
    train = TrainConfig(**(dict(steps=1, batch_size=8) | train))
    return Config(
        name, ModelConfig(**model), DepthConfig(**depth), train=train, mesh=MeshConfig(*mesh)
    )


def measure(name: str) -> dict[str, Any]:
    """Bytes a device: the plan by part, the compiler's, and how far off the plan is."""
    import jax

    from mor_jax.analysis.memory import training_memory
    from mor_jax.train.aot import compile_step

    cfg = config(name)
    memory = training_memory(cfg, devices=8, merged=True)
    compiled, _ = compile_step(cfg, jax.devices())
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.temp_size_in_bytes
    return {
        "program": name,
        "mesh": " x ".join(str(n) for n in CASES[name][2]),
        "planned": memory.total,
        "compiled": total,
        "off": memory.total / total - 1,
        "state": m.argument_size_in_bytes,
        "temporary": m.temp_size_in_bytes,
        "plan": dataclasses.asdict(memory),
    }


def _row(found: dict[str, Any]) -> str:
    from mor_jax.analysis import units

    sizes = f"{units.size(found['planned'])} | {units.size(found['compiled'])}"
    return f"| {found['program']} | {found['mesh']} | {sizes} | {found['off']:+.1%} |"


if __name__ == "__main__":
    main()
