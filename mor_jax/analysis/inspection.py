"""Everything about a run that can be known before it: shape, cost, memory, time. Nothing is
compiled.

`inspect_config` gives one JSON-ready dict; `inspection_tables` draws it for a terminal. The
conventions are those of the modules it asks: `accounting` (parameters, FLOPs), `traffic` (cache),
`memory` (training).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mor_jax.analysis import accounting, units
from mor_jax.analysis.drawing import draw_program, draw_shares, draw_unrolled
from mor_jax.analysis.memory import training_memory
from mor_jax.analysis.peaks import peak_flops
from mor_jax.analysis.traffic import decode_traffic, kv_by_depth
from mor_jax.config import REMAT, Config, mesh_shape
from mor_jax.data.tokenizer import load_tokenizer
from mor_jax.data.vocabulary import ByteTokenizer
from mor_jax.errors import ConfigError
from mor_jax.model.depth.warmup import stages
from mor_jax.model.program import build_program

# names `peak_flops` knows
CHIPS = ("H100", "H200", "B200", "A100", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e")


def with_vocabulary(cfg: Config) -> tuple[Config, str]:
    """The configuration with a vocabulary size, and a sentence on where it came from ("" if it was
    given).

    Training takes the size from the tokenizer it builds; here a BPE still to be trained counts at
    the size it asks for. Either way it is rounded up to a multiple of 64.

    Raises:
      ConfigError, DataError: the tokenizer is neither bytes, bpe nor a readable tokenizer.json.
    """
    if cfg.model.vocab_size:
        return cfg, ""
    name = cfg.data.tokenizer
    if name == "bytes":
        size, why = ByteTokenizer().vocab_size, "the byte tokenizer's"
    elif name == "bpe":
        size, why = cfg.data.bpe_vocab, "what the BPE to be trained asks for"
    elif os.path.exists(os.path.expanduser(name)):
        size, why = load_tokenizer(name).vocab_size, f"that of {name}"
    else:
        raise ConfigError(
            f"config.data.tokenizer = {name!r} is neither bytes, bpe nor an existing tokenizer.json."
        )
    size = -(-size // 64) * 64
    model = dataclasses.replace(cfg.model, vocab_size=size)
    return dataclasses.replace(
        cfg, model=model
    ), f"vocabulary {size}: {why}, rounded up to a multiple of 64"


def inspect_config(
    cfg: Config,
    *,
    devices: int = 1,
    mfu: float = 0.4,
    context: int | None = None,
    mean_active: Sequence[float] | None = None,
) -> dict[str, Any]:
    """All numbers of a checked configuration, JSON-ready.

    Args:
      devices: number of devices the mesh spans; memory and step time are per device.
      mfu: share of the chips' peak that a step is assumed to reach, true FLOPs of active tokens.
      context: tokens in the cache when the decode traffic is counted; default the model's context.
      mean_active: measured share of tokens that run recursion r = 1..R at decode; default the
        training capacities.
    Raises:
      ConfigError: `mfu` is not in (0, 1], `context` is not positive, or the mesh does not fit
        `devices`.
    """
    if not 0 < mfu <= 1:
        raise ConfigError(f"an MFU is a share in (0, 1], got {mfu:g}.")
    if context is not None and context < 1:
        raise ConfigError(f"a context is at least one token, got {context}.")
    cfg, note = with_vocabulary(cfg)
    m, d = cfg.model, cfg.depth
    program, count = build_program(m), accounting.parameters(m, d, cfg.recursion)
    true = accounting.true_flops_per_token(m, d, recursion=cfg.recursion)
    steps = accounting.training_steps(cfg)
    depths = kv_by_depth(m, d, mean_active=mean_active)
    kv_token = sum(p.bytes_per_token for p in depths)
    step_flops = accounting.true_step_flops(cfg)
    return {
        "name": cfg.name,
        "notes": [note] if note else [],
        "program": {
            "line": draw_program(m),
            "unrolled": draw_unrolled(m),
            "unique_layers": program.unique_layers,
            "unrolled_layers": program.unrolled_layers,
            "recursions": m.recursions,
            "policy": d.policy,
            "capacities": list(d.shares(m)),
            "shares": draw_shares(m, d),
            "warmup": [
                {"steps": s.last - s.first, "shares": list(s.shares)}
                for s in stages(m, d, steps)
                if s.index is not None
            ],
        },
        "parameters": count.to_dict(),
        "flops_per_token": {
            "paper": accounting.paper_flops_per_token(m, d),
            "true": {
                "blocks": true.blocks,
                "attention": true.attention,
                "head": true.head,
                "router": true.router,
                "recursion": true.recursion,
                "exit": true.exit,
                "total": true.total,
                "training": true.training,
            },
        },
        "run": {
            "steps": steps,
            "steps_from": "config.train.steps" if cfg.train.steps else "config.train.flops",
            "tokens_per_step": accounting.tokens_per_step(cfg),
            "tokens": steps * accounting.tokens_per_step(cfg),
            "paper_training_flops": accounting.paper_training_flops(cfg, steps),
            "true_training_flops": accounting.true_training_flops(cfg, steps),
        },
        "kv": {
            "measured": mean_active is not None,
            "by_depth": [p.to_dict() for p in depths],
            "bytes_per_token": kv_token,
            "bytes_per_sequence": kv_token * m.context,
            "traffic": decode_traffic(
                m, d, context, mean_active=mean_active, recursion=cfg.recursion
            ).to_dict(),
        },
        "memory": training_memory(cfg, devices=devices).to_dict()
        | {
            "mesh": list(mesh_shape(cfg.mesh, devices)),
            "activations_by_remat": {
                r: training_memory(cfg, devices=devices, remat=r).activations for r in REMAT
            },
        },
        "time": {
            "mfu": mfu,
            "devices": devices,
            "dtype": m.dtype,
            "chips": [
                {
                    "chip": chip,
                    "peak_flops": peak,
                    "step_s": (seconds := step_flops / (devices * peak * mfu)),
                    "run_s": accounting.true_training_flops(cfg, steps) / (devices * peak * mfu),
                    "tokens_per_s": accounting.tokens_per_step(cfg) / seconds,
                }
                for chip in CHIPS
                if (peak := peak_flops(chip, m.dtype))
            ],
        },
    }


def inspection_tables(report: dict[str, Any]) -> list[Table | Text]:
    """What `inspect_config` found, ready to print in order."""
    p, run, kv, memory = report["program"], report["run"], report["kv"], report["memory"]
    traffic, flops, time = kv["traffic"], report["flops_per_token"], report["time"]
    line = Text.assemble((report["name"], "bold"), "  ", p["line"])
    if p["shares"]:
        line.append(f"\n{p['policy']}: {p['shares']}", "dim")
    for stage in p["warmup"]:
        shares = " · ".join(f"r{r} {units.percent(s)}" for r, s in enumerate(stage["shares"], 1))
        line.append(f"\nwarm-up, {stage['steps']} steps: {shares}", "dim")
    for note in report["notes"]:
        line.append(f"\n{note}", "dim")

    shape = _table("model", "", "")
    shape.add_row("layers", f"{p['unrolled_layers']} unrolled, {p['unique_layers']} unique", "")
    for key in ("total", "non_embedding", "embedding", "router"):
        shape.add_row(
            f"parameters, {key.replace('_', '-')}", units.count(report["parameters"][key]), ""
        )
    shape.add_section()
    forward = flops["true"]["total"]
    shape.add_row(
        "FLOPs a token, paper", units.si(flops["paper"], "FLOPs", 4), "forward; sets the steps"
    )
    shape.add_row(
        "FLOPs a token, true",
        units.si(forward, "FLOPs", 4),
        f"forward; training is {flops['true']['training'] / forward:.3g} times this",
    )
    for key in ("blocks", "attention", "head", "router", "recursion"):
        if key == "recursion" and not flops["true"][key]:
            continue
        shape.add_row(
            f"  {key}",
            units.si(flops["true"][key], "FLOPs"),
            units.percent(flops["true"][key] / forward),
        )
    if flops["true"]["exit"]:
        shape.add_row("  exit rule", units.si(flops["true"]["exit"], "FLOPs"), "more, at inference")
    shape.add_section()
    shape.add_row("steps", f"{run['steps']:,}", f"from {run['steps_from']}")
    shape.add_row("tokens", units.count(run["tokens"]), f"{run['tokens_per_step']:,} a step")
    shape.add_row(
        "training FLOPs, paper", units.si(run["paper_training_flops"], "FLOPs"), "forward only"
    )
    shape.add_row(
        "training FLOPs, true",
        units.si(run["true_training_flops"], "FLOPs"),
        "forward and backward",
    )

    title = "cache at decode" + (
        ", depths as measured" if kv["measured"] else ", depths as in training"
    )
    cache = _table(title, "layers", "tokens kept", "a token", "a sequence")
    sequence = kv["bytes_per_sequence"] / kv["bytes_per_token"]
    for part in kv["by_depth"]:
        size = part["bytes_per_token"]
        cache.add_row(
            part["part"],
            str(part["layers"]),
            units.percent(part["stored"]),
            units.size(size),
            units.size(size * sequence),
        )
    cache.add_row(
        "all",
        str(sum(part["layers"] for part in kv["by_depth"])),
        "",
        units.size(kv["bytes_per_token"]),
        units.size(kv["bytes_per_sequence"]),
    )
    reads = Text(
        f"  decoding with {traffic['context']:,} tokens in the cache reads {units.size(traffic['read_mean'])} of it a token "
        f"({units.size(traffic['read_full_depth'])} at full depth), writes {units.size(traffic['written'])}, and reads "
        f"{units.size(traffic['weights'])} of weights a step\n",
        "dim",
    )

    needs = _table(
        f"training memory, each of {time['devices']} device{'s' * (time['devices'] > 1)}", "", ""
    )
    for key, hint in MEMORY_ROWS.items():
        if not memory[key] and key in ("frozen", "average"):
            continue
        needs.add_row(key.replace("_", " "), units.size(memory[key]), hint.format(**memory))
    needs.add_section()
    needs.add_row(
        "at the fullest moment",
        units.size(memory["total"]),
        f"when {memory['fullest']}; see analysis/memory.py",
    )
    needs.add_section()
    for policy, size in memory["activations_by_remat"].items():
        needs.add_row(f"activations, remat {policy}", units.size(size), "saved + working + head")

    chips = _table(
        f"time at {units.percent(time['mfu'], 0)} MFU, {time['dtype']}, {time['devices']} x",
        "a step",
        "tokens a second",
        "the run",
    )
    for chip in time["chips"]:
        chips.add_row(
            chip["chip"],
            units.duration(chip["step_s"]),
            units.count(chip["tokens_per_s"]),
            units.duration(chip["run_s"]),
        )
    return [line, shape, cache, reads, needs, chips]


MEMORY_ROWS = {
    "weights": "float32",
    "optimizer": "moments, float32",
    "frozen": "not trained: of adapters, a teacher, a reference",
    "average": "running mean of the weights",
    "gradients": "float32; twice under accumulation",
    "saved": "kept of the forward pass, model.remat = {remat}",
    "working": "of the one block being differentiated",
    "head": "logits of one chunk, gradient of the table",
}


def _table(title: str, *columns: str) -> Table:
    """A table whose first column names the row; without column names it has no header, and its last
    column is prose."""
    headed = any(columns)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=headed,
    )
    table.add_column("")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if headed or i == 0 else "left")
    return table
