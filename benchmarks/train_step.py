"""Speed of the full training step: forward, backward, clipping, AdamW.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --shape peer --models vanilla --breakdown \\
        --peer .venv-peer/bin/python
    python -m benchmarks.train_step --shape tiny --repeats 2 --peer off

One H100, the 360m of the paper:

    python -m benchmarks.train_step --shape 360m --dtype bfloat16 --context 2048 \\
        --models vanilla,recursive,mor \\
        --peer off --out benchmarks/results/train_step_h100.json

Models are timed in turns, one step each a round, so that a busy machine slows all alike; medians
are reported, and CPU seconds beside wall seconds. Two questions are answered: does skipping tokens
save the time it saves in FLOPs (mor against recursive; mor-masked computes everything and
discards), and is the dense twin as fast as a Llama in PyTorch.

Shapes: cpu (matrix products dominate, seconds a step on two cores), peer (33M parameters, more than
half of them vocabulary; 31.5M with --kv_heads=2), 360m (the paper's; one 80 GiB GPU), tiny (does it
run). Flags override single fields of a shape.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import breakdown, record
from benchmarks.peer import INSTALL, TorchPeer, interpreter
from configs import paper
from launch import cli
from mor_jax.analysis import accounting, units
from mor_jax.config import ATTENTION, DTYPES, REMAT, Config, from_config_dict
from mor_jax.errors import UserError
from mor_jax.model.lm import LM
from mor_jax.parallel.mesh import make_mesh
from mor_jax.train.schedule import optimizer
from mor_jax.train.state import create_state
from mor_jax.train.step import make_train_step
from mor_jax.train.workdir import mesh_device, versions

RECURSIONS = 3
# Targets: share of the FLOP saving that arrives as a saving of time.
SAVING_KEPT = {"mor": 0.9, "mor-token": 0.8, "mor-shared": 0.8}
OF_TORCH = 0.8  # target: tokens a second of the dense twin over the peer's, float32

_WIDTH, _HEADS, _KV, _MLP = paper.SIZES["360m"][1:]
# Fields of the model, and the rows of a batch. All layer counts fit Middle-Cycle with three
# recursions.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        layers=5, width=64, heads=4, kv_heads=2, mlp_width=192, context=96, vocab_size=256, rows=2
    ),
    "cpu": dict(
        layers=8,
        width=512,
        heads=8,
        kv_heads=8,
        mlp_width=1408,
        context=512,
        vocab_size=2048,
        rows=4,
    ),
    "peer": dict(
        layers=8,
        width=384,
        heads=6,
        kv_heads=6,
        mlp_width=1024,
        context=512,
        vocab_size=49152,
        rows=8,
    ),
    "360m": dict(
        layers=paper.layers_for("360m", RECURSIONS),
        width=_WIDTH,
        heads=_HEADS,
        kv_heads=_KV,
        mlp_width=_MLP,
        context=2048,
        vocab_size=49152,
        loss_chunk=256,
        remat="dots_no_batch",
        rows=8,
    ),
}

# What each model changes. vanilla is the dense twin: as many layers, every one with its own
# weights.
_SHARED = {"recursions": RECURSIONS, "sharing": "middle_cycle"}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "vanilla": {},
    "recursive": {"model": _SHARED},
    "mor": {"model": _SHARED, "depth": {"policy": "expert_choice", "executor": "gathered"}},
    "mor-token": {"model": _SHARED, "depth": {"policy": "token_choice", "executor": "gathered"}},
    "mor-shared": {
        "model": _SHARED,
        "depth": {"policy": "expert_choice", "executor": "gathered", "kv": "shared"},
    },
    "mor-masked": {"model": _SHARED, "depth": {"policy": "expert_choice", "executor": "masked"}},
}

ROUTED = tuple(name for name, fields in MODELS.items() if "depth" in fields)

_SHAPE = flags.DEFINE_enum("shape", "cpu", list(SHAPES), "Shape of the models; see above.")
_MODELS = flags.DEFINE_list("models", list(MODELS), f"Any of {', '.join(MODELS)}.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", list(DTYPES), "Of matrix products; parameters stay float32."
)
_ATTENTION = flags.DEFINE_enum(
    "attention", "blocked", list(ATTENTION), "cudnn: NVIDIA GPUs, bfloat16."
)
_REMAT = flags.DEFINE_enum(
    "remat", None, list(REMAT), "Rematerialisation; by default the shape's: dots_no_batch for 360m."
)
_BATCH = flags.DEFINE_integer("batch", None, "Rows a step instead of the shape's.")
_CONTEXT = flags.DEFINE_integer("context", None, "Tokens a row instead of the shape's.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", None, "Key and value heads instead of the shape's.")
_LOSS_CHUNK = flags.DEFINE_integer(
    "loss_chunk", None, "Positions whose logits exist at once; 0: all."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each model.", lower_bound=1)
_PEER = flags.DEFINE_string(
    "peer", "auto", "PyTorch: auto (if installed here), off, or the path of a Python that has it."
)
_BREAKDOWN = flags.DEFINE_bool("breakdown", False, "Also time the pieces of the vanilla step.")
_OUT = flags.DEFINE_string(
    "out", None, "Result; default benchmarks/results/train_step_<device>_<shape>_<dtype>.json."
)


class ModelRun:
    """One model, its training state and its compiled step."""

    def __init__(self, name: str, cfg: Config, mesh: Mesh, tokens_BxT: np.ndarray):
        self.name, self.cfg = name, cfg
        self.samples = record.Samples()
        self.lm = LM.from_config(cfg)
        self.tx = optimizer(cfg.optim, cfg.train.steps)
        self.state = create_state(self.lm, self.tx, mesh, cfg.train.seed)
        sharding = NamedSharding(mesh, self.lm.rules.spec(("batch", "time")))
        batch = {"tokens": tokens_BxT, "segment_ids": np.ones_like(tokens_BxT)}
        self.batch = jax.device_put(batch, sharding)
        if "choice" in self.state.params["router"]:
            self.state = self.state._replace(
                params=balanced(self.lm, self.state.params, self.batch)
            )
        step = jax.jit(make_train_step(self.lm, self.tx), donate_argnums=0)

        def build() -> None:
            self.compiled = step.lower(self.state, self.batch).compile()

        self.compile_seconds, _ = record.clock(build)
        self.memory = _memory(self.compiled)
        self.first_loss = self._step()  # the warm-up

    def once(self) -> tuple[float, float]:
        return record.clock(self._step)

    def _step(self) -> float:
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        steps = range(1, self.cfg.model.recursions + 1)
        self.selected = [float(metrics.get(f"router/{r}/selected", 1.0)) for r in steps]
        loss = float(metrics["lm_loss"])
        if not np.isfinite(loss):
            raise UserError(f"the loss of {self.name} is {loss}: what was timed is no training.")
        return loss

    def result(self, peak: float | None) -> dict[str, Any]:
        """Everything measured and counted about this model; `peak` FLOP/s of all devices."""
        cfg, seconds = self.cfg, self.samples.median
        # Depths chosen at once are counted as they were taken (all tokens run step 1); the others
        # at their capacities.
        counts = [share * cfg.model.context for share in self.selected]
        chosen = counts if cfg.depth.at_once else None
        per_token = accounting.true_flops_per_token(cfg.model, cfg.depth, mean_counts=chosen)
        flops = per_token.training * accounting.tokens_per_step(cfg)
        return {
            "selected": self.selected,
            "config": cfg.to_dict(),
            "parameters": accounting.parameters(cfg.model, cfg.depth).to_dict(),
            "compile_seconds": self.compile_seconds,
            **self.samples.to_dict(),
            "tokens_per_second": accounting.tokens_per_step(cfg) / seconds,
            "true_flops_per_step": flops,
            "paper_flops_per_step": accounting.paper_training_flops(cfg, 1),  # forward only
            "flops_per_second": flops / seconds,
            "mfu": flops / seconds / peak if peak else None,
            "memory_bytes": self.memory,
            "first_loss": self.first_loss,
        }


def balanced(lm: LM, params: Any, batch: Any) -> Any:
    """Parameters whose token-choice router loads all depths about alike in every row, as a trained
    balance does.

    At random weights a row's tokens share a direction (what its first tokens left in the
    attention's mean), which sends most of a row to one depth. So the router's vectors are turned
    orthogonal to the rows' mean states, the overall one among them, and given one length: what is
    left of a score differs by token alone.
    """
    x_BxTxD = np.asarray(
        jax.jit(lm.enter)(params, batch["tokens"], batch["segment_ids"]), np.float64
    )
    means_DxB, _ = np.linalg.qr(x_BxTxD.mean(axis=1).T)

    def turn(w_RxD):
        if w_RxD.ndim != 2:
            return w_RxD
        turned = np.asarray(w_RxD, np.float64)
        turned -= turned @ means_DxB @ means_DxB.T
        turned *= (
            np.linalg.norm(w_RxD)
            / np.sqrt(len(turned))
            / np.linalg.norm(turned, axis=1, keepdims=True)
        )
        return jax.device_put(turned.astype(w_RxD.dtype), w_RxD.sharding)

    router = params["router"] | {"choice": jax.tree.map(turn, params["router"]["choice"])}
    return params | {"router": router}


def _memory(compiled: Any) -> int | None:
    """Bytes one device needs for the step: state, batch and temporaries, as the compiler planned
    them."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return kept + stats.temp_size_in_bytes


def configuration(name: str, shape: dict[str, Any], devices: int) -> Config:
    """The checked configuration of one model at this shape."""
    fields = dict(shape)
    rows = fields.pop("rows")
    change = MODELS[name]
    return from_config_dict(
        {
            "name": name,
            "model": fields | change.get("model", {}),
            "depth": change.get("depth", {}),
            "optim": {"schedule": "constant", "peak_lr": 3e-4, "warmup": 0.0},
            "train": {"steps": 1000, "batch_size": rows},
        },
        devices=devices,
    )


def measure(
    shape: dict[str, Any],
    names: Sequence[str],
    *,
    repeats: int = 5,
    peer: str | None = None,
    pieces: bool = False,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time the models at `shape` in turns.

    Args:
      shape: as in SHAPES, with dtype, attention and the like added.
      names: of MODELS.
      peer: a Python with torch and transformers, or None.
      pieces: also time the vanilla step in pieces.
    Returns: the record, JSON-ready.
    """
    device = jax.devices()[0]
    dense = configuration("vanilla", shape, jax.device_count())
    mesh = make_mesh(dense.mesh)
    m = dense.model
    tokens_BxT = np.random.default_rng(0).integers(
        0, m.vocab_size, (dense.train.batch_size, m.context), np.int32
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        torch = None
        if peer:
            tell("torch: starting")
            torch = TorchPeer(peer, dense, tokens_BxT, device.platform)
            stack.callback(torch.close)
        models = {}
        for name in names:
            tell(f"{name}: compiling")
            models[name] = ModelRun(name, configuration(name, shape, mesh.size), mesh, tokens_BxT)
        parts = []
        if pieces:
            tell("pieces: compiling")
            parts = breakdown.pieces(models["vanilla"])
        busy = record.rounds([*models.values(), *filter(None, [torch]), *parts], repeats, tell)

    peak = accounting.peak_flops(device.device_kind, m.dtype)
    result: dict[str, Any] = {
        "benchmark": "train_step",
        "time": record.now(),
        "commit": record.commit(),
        "device": mesh_device(mesh),
        "machine": platform.machine(),
        "processor": record.processor(),
        "cores": record.cores(),
        "versions": versions(),
        "busy": busy,
        "shape": shape,
        "tokens_per_step": accounting.tokens_per_step(dense),
        "repeats": repeats,
        "models": {name: run.result(peak and peak * mesh.size) for name, run in models.items()},
    }
    if torch:
        result["torch"] = {
            **torch.facts,
            **torch.samples.to_dict(),
            "tokens_per_second": result["tokens_per_step"] / torch.samples.median,
            "split_seconds": torch.split(),
            "first_loss": torch.first_loss,
        }
    if parts:
        split = torch.split() if torch else None
        result["breakdown"] = breakdown.analyse(models["vanilla"].samples.median, parts, split)
    return result | {"headline": headline(result)}


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The comparisons, as far as the models for them were timed."""
    models, found = result["models"], {}
    if "recursive" in models:
        for name in ROUTED:
            if name in models:
                found[name] = _saving(models["recursive"], models[name])
    if "vanilla" in models:
        dense = models["vanilla"]
        for name in found:
            found[name]["flops_per_second_of_vanilla"] = (
                models[name]["flops_per_second"] / dense["flops_per_second"]
            )
        if "torch" in result:
            torch = result["torch"]
            found["vanilla"] = {
                "speed_of_torch": torch["seconds"] / dense["seconds"],
                "speed_of_torch_cpu_time": torch["cpu_seconds"] / dense["cpu_seconds"],
                "speed_of_torch_rounds": _ratios(torch, dense),
            }
    return found


def _ratios(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Seconds of one over seconds of the other, a round at a time."""
    return [a / b for a, b in zip(one["rounds_seconds"], other["rounds_seconds"], strict=True)]


def _saving(full: dict[str, Any], routed: dict[str, Any]) -> dict[str, Any]:
    flops = 1 - routed["true_flops_per_step"] / full["true_flops_per_step"]
    seconds = 1 - routed["seconds"] / full["seconds"]
    return {
        "flops_saved": flops,
        "time_saved": seconds,
        "saving_kept": seconds / flops,
        "saving_kept_cpu_time": (1 - routed["cpu_seconds"] / full["cpu_seconds"]) / flops,
        "saving_kept_rounds": [(1 - ratio) / flops for ratio in _ratios(routed, full)],
    }


# -------------------------------------------------------------------- what a person reads


def show(result: dict[str, Any], console: Console) -> None:
    """Tables and the headline."""
    console.print(_models_table(result))
    if "breakdown" in result:
        console.print(_breakdown_table(result))
    for line in _headline_lines(result):
        console.print(line)
    others = result["busy"]["others_share_of_cores"]
    if others is not None and others > 0.1 and result["device"].split(" x ")[1].startswith("cpu"):
        share = units.percent(others, 0)
        console.print(
            f"[yellow]Other processes used {share} of the cores meanwhile: measure again when they do not.[/]"
        )


def _models_table(result: dict[str, Any]) -> Table:
    shape = result["shape"]
    title = (
        f"One training step: {shape['rows']} rows x {shape['context']} tokens, {shape['dtype']}, {result['device']}, "
        f"median of {result['repeats']}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    columns = [
        "model",
        "compile",
        "wall",
        "CPU time",
        "tokens",
        "FLOPs true",
        "FLOPs paper",
        "rate",
    ]
    columns += ["of vanilla", "MFU", "memory"]
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    models = result["models"]
    dense = models.get("vanilla")
    for name, r in models.items():
        table.add_row(
            name,
            units.duration(r["compile_seconds"]),
            _seconds(r["seconds"]),
            _seconds(r["cpu_seconds"]),
            units.si(r["tokens_per_second"], "tok/s"),
            units.si(r["true_flops_per_step"]),
            units.si(r["paper_flops_per_step"]),
            units.si(r["flops_per_second"], "FLOP/s"),
            units.fixed(dense and r["flops_per_second"] / dense["flops_per_second"], 2),
            units.percent(r["mfu"]),
            units.size(r["memory_bytes"]),
        )
    if "torch" in result:
        r = result["torch"]
        flops = configured_flops(result) / r["seconds"]
        table.add_row(
            f"torch {r['torch']}",
            units.NONE,
            _seconds(r["seconds"]),
            _seconds(r["cpu_seconds"]),
            units.si(r["tokens_per_second"], "tok/s"),
            units.NONE,
            units.NONE,
            units.si(flops, "FLOP/s"),
            units.fixed(dense and flops / dense["flops_per_second"], 2),
            units.NONE,
            units.NONE,
        )
    return table


def configured_flops(result: dict[str, Any]) -> float:
    """True FLOPs of the dense step, which is also torch's."""
    return accounting.true_training_flops(
        configuration("vanilla", result["shape"], jax.device_count()), 1
    )


def _breakdown_table(result: dict[str, Any]) -> Table:
    table = Table(title="Where the vanilla step goes", box=box.SIMPLE_HEAD, title_justify="left")
    columns = ("piece", "wall", "share", "rate", *(["torch"] if "torch" in result else []))
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in result["breakdown"]:
        rate = units.si(row["flops_per_second"], "FLOP/s")
        if row["bytes_per_second"]:
            rate = units.si(row["bytes_per_second"], "B/s")
        cells = [
            "  " * row["level"] + row["name"],
            _seconds(row["seconds"]),
            units.percent(row["share_of_step"]),
            rate,
        ]
        table.add_row(*cells, *([_seconds(row["torch_seconds"])] if "torch" in result else []))
    return table


def _headline_lines(result: dict[str, Any]) -> list[str]:
    found, lines = result["headline"], []
    for name in ROUTED:
        if name not in found:
            continue
        h = found[name]
        target = "the contrast: computed and discarded"
        if name in SAVING_KEPT:
            target = _verdict(h["saving_kept"], SAVING_KEPT[name])
        lines.append(
            f"[bold]{name}[/] saves {units.percent(h['flops_saved'])} of recursive's FLOPs and "
            f"{units.percent(h['time_saved'])} of its time: it keeps [bold]{units.percent(h['saving_kept'], 0)}[/] "
            f"of the saving ({_range(h['saving_kept_rounds'])}; "
            f"by CPU time {units.percent(h['saving_kept_cpu_time'], 0)}); {target}."
        )
        if "flops_per_second_of_vanilla" in h:
            lines.append(
                f"    Its FLOP/s are {units.percent(h['flops_per_second_of_vanilla'], 0)} of the dense twin's."
            )
    if "vanilla" in found:
        h, dtype = found["vanilla"], result["shape"]["dtype"]
        target = (
            _verdict(h["speed_of_torch"], OF_TORCH)
            if dtype == "float32"
            else "no target in bfloat16"
        )
        lines.append(
            f"[bold]vanilla[/] runs at [bold]{units.fixed(h['speed_of_torch'], 2)}[/] of torch's tokens a second "
            f"({_range(h['speed_of_torch_rounds'], units.fixed, 2)}; by CPU time "
            f"{units.fixed(h['speed_of_torch_cpu_time'], 2)}); {target}."
        )
    return lines


def _verdict(value: float, target: float) -> str:
    reached = "[green]reached[/]" if value >= target else "[red]not reached[/]"
    return f"target at least {units.percent(target, 0)}: {reached}"


def _range(
    values: list[float], show: Callable[[float, int], str] = units.percent, decimals: int = 0
) -> str:
    if len(values) < 2:
        return "one round"
    low, middle, high = min(values), statistics.median(values), max(values)
    return (
        f"a round: median {show(middle, decimals)}, {show(low, decimals)} to {show(high, decimals)}"
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return units.NONE
    return (
        f"{units.significant(1000 * value)}\u00a0ms"
        if value < 1
        else f"{units.significant(value)}\u00a0s"
    )


# -------------------------------------------------------------------- the command


def _shape() -> dict[str, Any]:
    given = {
        "context": _CONTEXT.value,
        "rows": _BATCH.value,
        "remat": _REMAT.value,
        "loss_chunk": _LOSS_CHUNK.value,
        "dtype": _DTYPE.value,
        "attention": _ATTENTION.value,
        "kv_heads": _KV_HEADS.value,
    }
    return SHAPES[_SHAPE.value] | {k: v for k, v in given.items() if v is not None}


def _out(shape: dict[str, Any]) -> Path:
    if _OUT.value:
        return Path(_OUT.value)
    device = record.slug(jax.devices()[0].device_kind)
    return (
        record.ROOT
        / "benchmarks"
        / "results"
        / f"train_step_{device}_{_SHAPE.value}_{shape['dtype']}.json"
    )


def main(_: list[str]) -> None:
    names = list(dict.fromkeys(_MODELS.value))
    unknown = [n for n in names if n not in MODELS]
    if unknown or not names:
        raise UserError(
            f"--models: {', '.join(unknown) or 'nothing'} is none of {', '.join(MODELS)}."
        )
    if _BREAKDOWN.value and "vanilla" not in names:
        raise UserError("--breakdown takes the vanilla step apart: add vanilla to --models.")
    peer = interpreter(_PEER.value)
    if peer:
        # leave GPU memory to the peer
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    shape = _shape()
    for name in names:
        # refuses what cannot run before anything has run
        configuration(name, shape, jax.device_count())
    out = _out(shape)
    record.claim(out)

    console, status = Console(), Console(stderr=True)
    if console.width < 140 and not console.is_terminal:
        console = Console(width=160)  # a file: tables unbroken
    result = measure(
        shape, names, repeats=_REPEATS.value, peer=peer, pieces=_BREAKDOWN.value, tell=status.print
    )
    result = {"shape_name": _SHAPE.value} | result
    show(result, console)
    if not peer and _PEER.value == "auto":
        console.print(f"No peer: {INSTALL}", markup=False)
    record.write(out, result)
    console.print(f"Written: {out}", markup=False)


if __name__ == "__main__":
    cli.run(main)
