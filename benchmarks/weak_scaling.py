"""Weak scaling on simulated devices: what each device sends in a step, as compiled, against theory.

    python -m benchmarks.weak_scaling
    python -m benchmarks.weak_scaling --kind vanilla --devices 8

One more row of the batch for every device. Data parallelism, FSDP, tensor and sequence parallelism
over 1, 2, 4, 8 devices; bytes that each device sends per step (rings,
`mor_jax/analysis/collectives.py`) beside those of `mor_jax/analysis/collective_plan.py`. Bytes are
exact: they are read off the compiled program, which is the one that runs. Times on simulated
devices mean nothing (they share the cores, and their links are memory), so none are taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import os


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", default="mor", choices=("mor", "token", "vanilla"))
    parser.add_argument(
        "--devices", type=int, default=8, help="the most devices; powers of two up to it are taken"
    )
    parser.add_argument("--axes", nargs="+", default=["data", "fsdp", "tensor", "sequence"])
    args = parser.parse_args()
    # The second flag is about machine code alone, which never runs here.
    simulated = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["XLA_FLAGS"] = f"{simulated} --xla_llvm_disable_expensive_passes=true"
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(
        "| axis | devices | sent, compiled | sent, planned | of it all-gather / reduce-scatter / all-reduce |"
    )
    print("|---|---:|---:|---:|---|")
    for axis in args.axes:
        for n in (2**i for i in range(args.devices.bit_length()) if 2**i <= args.devices):
            if n > 1 or axis == args.axes[0]:
                print(row(args.kind, axis, n), flush=True)


def row(kind: str, axis: str, n: int) -> str:
    """One line of the table: the model of `config` on n devices along one axis."""
    import jax

    from mor_jax.analysis import units
    from mor_jax.analysis.collective_plan import planned_collectives, total_bytes
    from mor_jax.analysis.collectives import read_collectives
    from mor_jax.analysis.memory import MERGES_GATHERS
    from mor_jax.train.aot import compile_step

    cfg = config(kind, axis, n)
    compiled, mesh = compile_step(cfg, jax.devices()[:n])
    found = read_collectives(compiled.as_text(), dict(mesh.shape))
    sent = sum(c.wire_bytes for c in found)
    planned = total_bytes(planned_collectives(cfg, devices=n, regather=not MERGES_GATHERS))
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    parts = " / ".join(units.size(sum(c.wire_bytes for c in found if c.kind == k)) for k in kinds)
    return f"| {axis if n > 1 else 'one device'} | {n} | {units.size(sent)} | {units.size(planned)} | {parts} |"


def config(kind: str, axis: str, n: int):
    """A model of 2.9M parameters; a row of the batch for each device of data and fsdp, else
    four."""
    from mor_jax.config import Config, DepthConfig, MeshConfig, ModelConfig, TrainConfig

    shape = ModelConfig(
        layers=4,
        recursions=1,
        width=256,
        heads=8,
        kv_heads=8,
        mlp_width=704,
        vocab_size=1024,
        context=128,
        loss_chunk=64,
    )
    depth = {
        "mor": DepthConfig("expert_choice"),
        "token": DepthConfig("token_choice", buckets=1),
        "vanilla": DepthConfig(),
    }[kind]
    if kind != "vanilla":
        shape = dataclasses.replace(shape, recursions=3, sharing="cycle", prelude=1)
    rows = n if axis in ("data", "fsdp") else 4
    sizes = {"data": 1, axis: n}
    return Config(
        "weak", shape, depth, train=TrainConfig(steps=1, batch_size=rows), mesh=MeshConfig(**sizes)
    )


if __name__ == "__main__":
    main()
