"""The comparison of runs as data, and the same data for a terminal, a README and a page.

The headline is bits per byte under *causal* evaluation: the model decides depths the way it must
when it generates. Evaluation with the top-k selection of training looks at the whole row, the
future included, and is shown only as what the paper's numbers are comparable with (MoR spec,
finding 2).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mor_jax.analysis import accounting, units
from mor_jax.analysis.runs import RunRecord, number
from mor_jax.config import Config
from mor_jax.errors import UserError

MISSING_NOTE = "unfinished"


@dataclass(frozen=True)
class Row:
    """One quantity of every run."""

    label: str
    hint: str  # what exactly is counted; one sentence
    cells: tuple[str, ...]
    # which cells to emphasise; none where a comparison has no better and worse
    best: tuple[bool, ...]
    headline: bool = False


@dataclass(frozen=True)
class Quantity:
    """How a row is made: a value of each run, None where there is none, and how it is written."""

    label: str
    hint: str
    value: Callable[[RunRecord], float | None]
    show: Callable[[float | None], str]
    better: str = ""  # low | high | ""
    headline: bool = False


def quantities() -> tuple[Quantity, ...]:
    """The rows of the comparison, in order."""
    return (
        Quantity(
            "Unique parameters",
            "without the embedding; a shared block counts once",
            non_embedding,
            units.count,
            "low",
        ),
        Quantity(
            "Paper FLOPs / token",
            "forward, the paper's accounting: no head, full-width keys and values",
            paper_flops,
            _flops,
            "low",
        ),
        Quantity(
            "True FLOPs / token",
            "forward, active tokens, head and router included",
            true_flops,
            _flops,
            "low",
        ),
        Quantity(
            "Training FLOPs, paper",
            "what the budget is counted in: forward only",
            paper_training,
            _flops,
        ),
        Quantity("Training FLOPs, true", "forward and backward", true_training, _flops),
        Quantity("Steps", "optimiser steps done", lambda r: r.steps or None, _integer),
        Quantity("Training tokens", "read, all devices together", tokens, units.count),
        Quantity(
            "Validation bits / byte, causal",
            "depths decided without seeing the future, as in generation",
            bits_per_byte,
            units.fixed,
            "low",
            headline=True,
        ),
        Quantity("Validation NLL, causal", "nats a token", _eval("causal/nll"), units.fixed, "low"),
        Quantity(
            "Validation NLL, top-k",
            "nats a token; the selection sees the whole row, so this is no honest score "
            "of a routed model",
            _eval("topk/nll"),
            units.fixed,
        ),
        Quantity(
            "Mean depth, causal", "recursions a token runs", mean_depth, lambda v: units.fixed(v, 2)
        ),
        Quantity(
            "Sampling accuracy",
            "how often the threshold agrees with the top-k selection",
            _routed_eval("sampling_accuracy"),
            units.percent,
            "high",
        ),
        Quantity(
            "Dead tokens",
            "positions never selected at the last recursion",
            _routed_eval("dead_token_ratio"),
            units.percent,
            "low",
        ),
        Quantity(
            "Training speed",
            "tokens a second, median",
            tokens_per_second,
            lambda v: units.si(v, "tok/s"),
            "high",
        ),
        Quantity(
            "KV cache / token",
            "bytes; at the measured depths where there are some",
            kv_bytes,
            units.size,
            "low",
        ),
        Quantity(
            "Trigram floor",
            "bits per byte of a byte trigram model on the same text",
            trigram,
            units.fixed,
        ),
    )


def compare(runs: Sequence[RunRecord]) -> tuple[Row, ...]:
    """The comparison, one column a run.

    Raises:
      UserError: no runs.
    """
    if not runs:
        raise UserError("There is no run to compare; give at least one run directory.")
    rows = []
    for quantity in quantities():
        values = [quantity.value(run) for run in runs]
        rows.append(
            Row(
                label=quantity.label,
                hint=quantity.hint,
                cells=tuple(quantity.show(v) for v in values),
                best=_best(values, quantity.better),
                headline=quantity.headline,
            )
        )
    return tuple(rows)


def rich_table(runs: Sequence[RunRecord]) -> Table:
    """The comparison for a terminal; the best cell of a row is bold green."""
    table = Table(
        title="Comparison", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("")
    for name in headers(runs):
        table.add_column(Text(name), justify="right")
    for row in compare(runs):
        cells = [
            Text(c, style="bold green" if b else "")
            for c, b in zip(row.cells, row.best, strict=True)
        ]
        table.add_row(Text(row.label, style="bold" if row.headline else ""), *cells)
    return table


def print_table(runs: Sequence[RunRecord], console: Console | None = None) -> None:
    """Print the comparison and what is missing from the runs."""
    console = console or Console()
    console.print(rich_table(runs))
    for run in runs:
        for note in run.notes:
            console.print(Text(f"{run.name}: {note}", style="dim"))


def depth_curve_table(title: str, record: Mapping[str, Any]) -> Table:
    """`train.curve.depth_curve` for a terminal: what was asked, what tokens ran, what it cost."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for name in (
        "depth asked for",
        "mean depth",
        "off by",
        "NLL",
        "bits / byte",
        "% at depth 0, 1 ..",
    ):
        table.add_column(name, justify="left" if name == "depth asked for" else "right")

    def add(asked: str, point: Mapping[str, Any], off: str = "") -> None:
        shares = " ".join(f"{100 * s:.0f}" for s in point["depth_share"])
        depth, bits = units.fixed(point["mean_depth"]), units.fixed(point["bits_per_byte"])
        table.add_row(asked, depth, off, units.fixed(point["nll"], 4), bits, shares)

    add("as configured", record["as_configured"])
    for point in record["dial"]:
        add(f"mean {point['asked']:g}", point, f"{point['mean_depth'] / point['asked'] - 1:+.1%}")
    for point in record["cap"]:
        add(f"at most {point['max_depth']}", point)
    rises = [
        f"{a['asked']:g} to {b['asked']:g}"
        for a, b in pairwise(record["dial"])
        if b["nll"] > a["nll"]
    ]
    if record["dial"]:
        fall = record["dial"][0]["nll"] - record["dial"][-1]["nll"]
        table.caption = f"Over the whole dial the NLL falls by {fall:.4f}" + (
            f"; it rises from {', '.join(rises)}." if rises else ", at every turn."
        )
        table.caption_justify = "left"
    return table


def evaluation_table(title: str, record: Mapping[str, Any]) -> Table:
    """One evaluation record (`train.evaluate`), the two selection modes side by side."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("held out")
    table.add_column("causal (as generated)", justify="right", style="bold")
    table.add_column("top-k (sees the row)", justify="right")
    for label, key in (
        ("bits / byte", "bits_per_byte"),
        ("NLL, nats / token", "nll"),
        ("mean depth", "mean_depth"),
    ):
        table.add_row(label, *(units.fixed(record[f"{mode}/{key}"]) for mode in ("causal", "topk")))

    def share(mode: str) -> str:
        return "  ".join(f"{r}: {s:.0%}" for r, s in enumerate(record[f"{mode}/depth_share"]))

    table.add_row("depth of tokens", share("causal"), share("topk"))
    if "sampling_accuracy" in record:
        table.add_row("sampling accuracy", units.percent(record["sampling_accuracy"]), "")
        table.add_row("dead tokens", "", units.percent(record["dead_token_ratio"]))
    table.caption = f"{record['tokens']:,.0f} tokens, {record['bytes']:,.0f} bytes predicted"
    table.caption_justify = "left"
    return table


def to_markdown(runs: Sequence[RunRecord]) -> str:
    """The comparison as a GitHub table; the best cell of a row is bold."""
    lines = [
        "| | " + " | ".join(_pipe(n) for n in headers(runs)) + " |",
        "|---|" + "---:|" * len(runs),
    ]
    for row in compare(runs):
        cells = [f"**{c}**" if b else c for c, b in zip(row.cells, row.best, strict=True)]
        label = f"**{row.label}**" if row.headline else row.label
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def headers(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """Column names: the run's, marked while it has not ended."""
    return tuple(run.name if run.finished else f"{run.name} ({MISSING_NOTE})" for run in runs)


def non_embedding(run: RunRecord) -> float | None:
    if config := _counted(run):
        return float(
            accounting.parameters(config.model, config.depth, config.recursion).non_embedding
        )
    return number((run.summarised("parameters") or {}).get("non_embedding"))


def paper_flops(run: RunRecord) -> float | None:
    if run.config:
        return accounting.paper_flops_per_token(run.config.model, run.config.depth)
    return number(run.summarised("paper_flops_per_token"))


def true_flops(run: RunRecord) -> float | None:
    if config := _counted(run):
        return accounting.true_flops_per_token(
            config.model, config.depth, recursion=config.recursion
        ).total
    return number(run.summarised("true_flops_per_token"))


def paper_training(run: RunRecord) -> float | None:
    if run.config and run.steps:
        return accounting.paper_training_flops(run.config, run.steps)
    return number(run.summarised("paper_training_flops"))


def true_training(run: RunRecord) -> float | None:
    if (config := _counted(run)) and run.steps:
        return accounting.true_training_flops(config, run.steps)
    return number(run.summarised("true_training_flops"))


def tokens(run: RunRecord) -> float | None:
    if run.config and run.steps:
        return float(run.steps * accounting.tokens_per_step(run.config))
    return number(run.summarised("tokens"))


def bits_per_byte(run: RunRecord) -> float | None:
    """The headline: causal validation bits per byte of the newest evaluation."""
    return number(run.last_eval("causal/bits_per_byte"))


def mean_depth(run: RunRecord) -> float | None:
    """None without recursion: there is no depth to speak of."""
    if run.recursions == 1:
        return None
    return number(run.last_eval("causal/mean_depth")) if run.routed else float(run.recursions)


def tokens_per_second(run: RunRecord) -> float | None:
    _, speeds = run.series("tokens_per_s")
    # The first record contains the compilation.
    return (
        statistics.median(speeds[1:] or speeds)
        if speeds
        else number(run.summarised("tokens_per_s"))
    )


def kv_bytes(run: RunRecord) -> float | None:
    if not run.config:
        return number(run.summarised("kv_bytes_per_token"))
    shares = run.last_eval("causal/active_share") if run.routed else None
    if not (isinstance(shares, list) and len(shares) == run.recursions):
        shares = None
    return accounting.kv_bytes_per_token(run.config.model, run.config.depth, mean_active=shares)


def trigram(run: RunRecord) -> float | None:
    return number(run.summarised("trigram_bits_per_byte"))


def _counted(run: RunRecord) -> Config | None:
    """Its configuration, where that is enough to count by."""
    config = run.config
    return config if config is not None and config.model.vocab_size > 0 else None


def _eval(key: str) -> Callable[[RunRecord], float | None]:
    return lambda run: number(run.last_eval(key))


def _routed_eval(key: str) -> Callable[[RunRecord], float | None]:
    return lambda run: number(run.last_eval(key)) if run.routed else None


def _flops(value: float | None) -> str:
    return units.si(value, "FLOPs")


def _integer(value: float | None) -> str:
    return units.NONE if value is None else f"{value:,.0f}"


def _best(values: Sequence[float | None], better: str) -> tuple[bool, ...]:
    known = [v for v in values if v is not None]
    if not better or len(known) < 2 or min(known) == max(known):
        return (False,) * len(values)
    target = min(known) if better == "low" else max(known)
    return tuple(v == target for v in values)


def _pipe(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
