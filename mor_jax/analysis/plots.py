"""The figures of a report. Each function draws one quantity of all runs on one axis, or returns
None without data.

A run keeps its colour through all figures; save with `canvas.save_png`, inline with
`canvas.to_svg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, ScalarFormatter

from mor_jax.analysis import accounting, routing_plots, tables, units
from mor_jax.analysis.canvas import legend, new_axes
from mor_jax.analysis.palette import INK, MUTED, series
from mor_jax.analysis.runs import RunRecord

MAX_POINTS = 600  # of a line; more cannot be seen at page width and would make the page heavy


@dataclass(frozen=True)
class Plot:
    """A figure and the sentence under it. `key` is a short unique name."""

    key: str
    caption: str
    figure: Figure


def all_plots(runs: Sequence[RunRecord]) -> list[Plot]:
    """Every figure there is data for, in reading order."""
    return list(_all(runs))


def _all(runs: Sequence[RunRecord]) -> Iterator[Plot]:
    shared: list[tuple[str, str, Callable[[Sequence[RunRecord]], Figure | None]]] = [
        (
            "eval",
            "The headline over the budget; depths of a routed model are decided causally. A model below the "
            "dashed line knows more than which byte follows which two.",
            bits_per_byte_by_flops,
        ),
        (
            "loss-steps",
            "Training loss, smoothed over the raw values; the first steps are cut off at the top.",
            loss_by_step,
        ),
        (
            "loss-flops",
            "The same against the paper's training FLOPs: at one budget, cheaper steps mean more of them.",
            loss_by_flops,
        ),
        (
            "depth",
            "Mean number of recursions a token ran: solid as decided causally in evaluation, dotted as the "
            "capacities force in training. Where they meet, the threshold lets as many tokens go on as "
            "training did.",
            mean_depth,
        ),
        (
            "histogram",
            "How deep the tokens of the validation text went in the newest evaluation, decided causally.",
            depth_histogram,
        ),
        (
            "loss-depth",
            "Where the loss is: of the predictions made at tokens of each depth, decided causally; a dot is as "
            "large as the depth's share of the tokens.",
            routing_plots.depth_against_loss,
        ),
        (
            "dead",
            "Positions of a row that top-k never takes to the last recursion, over the held-out rows. Near zero: the "
            "router looks at tokens, not at places.",
            routing_plots.dead_tokens,
        ),
        ("speed", "Tokens a second in training.", speed),
    ]
    for key, caption, draw in shared:
        figure = draw(runs)
        if figure:
            yield Plot(key, caption, figure)
    for i, run in enumerate(runs):
        for key, caption, draw in (
            (
                "scores-histogram",
                "Every column is the scores of a moment, darker where more of them lie; the dashed line is "
                "where tokens go on. A router that has decided has two dark bands and nothing between them.",
                routing_plots.score_histogram,
            ),
            (
                "capacity",
                "Lines: training. Dots: decided causally in evaluation. Grey: the shares that were configured, or "
                "that a balanced router would give.",
                routing_plots.capacity,
            ),
            (
                "balance",
                "Share of tokens whose depth is exactly so many recursions; dashed: all alike. MaxVio is 0 then, "
                "and R - 1 when all tokens take the same depth.",
                routing_plots.balance,
            ),
        ):
            figure = draw(run)
            if figure:
                yield Plot(f"{key}-{i}", caption, figure)
        # Where depths are decided at once there is one rule, in training and in decoding: they
        # always agree.
        figure = None if routing_plots.at_once(run) else sampling_accuracy(run)
        if figure:
            yield Plot(
                f"accuracy-{i}",
                "How often a router's score, cut at the threshold, agrees with the selection "
                "of training. The first recursion takes everything where its capacity is 1.",
                figure,
            )
        figure = router_scores(run)
        if figure:
            yield Plot(
                f"scores-{i}",
                "Router scores: mean and one standard deviation. Scores near 0 and 1 separate "
                "tokens clearly; a collapsed band does not.",
                figure,
            )


def loss_by_step(runs: Sequence[RunRecord]) -> Figure | None:
    """Training loss (nats a token) against optimiser steps."""
    return _loss(runs, "optimiser steps", lambda run: 1.0)


def loss_by_flops(runs: Sequence[RunRecord]) -> Figure | None:
    """Training loss (nats a token) against training FLOPs after the paper."""
    return _loss(runs, "training FLOPs (paper: forward only)", _flops_a_step)


def bits_per_byte_by_flops(runs: Sequence[RunRecord]) -> Figure | None:
    """Causal validation bits per byte against training FLOPs after the paper, with the trigram
    floor."""
    figure, axes = new_axes(
        "Validation bits per byte, causal", "training FLOPs (paper: forward only)"
    )
    lowest, highest = math.inf, -math.inf
    ends: list[tuple[float, float, str]] = []
    for i, run in enumerate(runs):
        scale = _flops_a_step(run)
        steps, values = run.series("causal/bits_per_byte", "eval")
        if not values and not run.routed:
            steps, values = run.series("topk/bits_per_byte", "eval")
        if scale is None or not values:
            continue
        # An evaluation before or just after the start would press everything else to the floor.
        kept = [(s * scale, v) for s, v in zip(steps, values, strict=True) if s > 0]
        if not kept:
            continue
        x, y = zip(*kept, strict=True)
        axes.plot(x, y, color=series(i), linewidth=1.8, marker="o", markersize=4, label=run.name)
        ends.append((y[-1], x[-1], series(i)))
        lowest, highest = min(lowest, *y), max(highest, y[min(1, len(y) - 1)])
    if lowest == math.inf:
        return None
    floors = [f for f in map(tables.trigram, runs) if f is not None]
    if floors:
        axes.axhline(
            floors[0],
            color=MUTED[0],
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label="byte trigram model",
        )
        lowest, highest = min(lowest, floors[0]), max(highest, floors[0])
    margin = 0.08 * (highest - lowest or 1)
    axes.set_ylim(lowest - margin, highest + margin)
    axes.margins(x=0.09)
    _end_labels(axes, ends)
    legend(axes)
    return figure


def mean_depth(runs: Sequence[RunRecord]) -> Figure | None:
    """Mean recursions a token: causal in evaluation (solid), by capacity in training (dotted);
    routed runs only."""
    figure, axes = new_axes("Mean depth", "optimiser steps")
    drawn = False
    for i, run in enumerate(runs):
        if not run.routed:
            continue
        steps, values = run.series("causal/mean_depth", "eval")
        if values:
            axes.plot(
                steps,
                values,
                color=series(i),
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=f"{run.name}, causal",
            )
        forced_steps, forced = _thin(*run.series("mean_depth"))
        if forced:
            axes.plot(
                forced_steps,
                forced,
                color=series(i),
                linewidth=1.2,
                linestyle=":",
                label=f"{run.name}, top-k",
            )
        drawn = drawn or bool(values or forced)
    if not drawn:
        return None
    axes.set_ylim(0, max(run.recursions for run in runs) + 0.2)
    legend(axes)
    return figure


def depth_histogram(runs: Sequence[RunRecord]) -> Figure | None:
    """Share of validation tokens by depth 0..R in the newest causal evaluation; routed runs
    only."""
    shares = [
        (i, run, run.last_eval("causal/depth_share")) for i, run in enumerate(runs) if run.routed
    ]
    shares = [(i, run, s) for i, run, s in shares if isinstance(s, list) and s]
    if not shares:
        return None
    figure, axes = new_axes("Depth of validation tokens", "depth: recursions a token ran")
    width = 0.8 / len(shares)
    for place, (i, run, share) in enumerate(shares):
        x = [d + (place - (len(shares) - 1) / 2) * width for d in range(len(share))]
        bars = axes.bar(x, share, width * 0.9, color=series(i), label=run.name)
        axes.bar_label(
            bars, [units.percent(s, 0) for s in share], fontsize=8.5, color=INK[0], padding=2
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(y=0.15)
    legend(axes)
    return figure


def speed(runs: Sequence[RunRecord]) -> Figure | None:
    """Training tokens a second against optimiser steps."""
    figure, axes = new_axes("Training tokens a second", "optimiser steps")
    top = 0.0
    for i, run in enumerate(runs):
        steps, values = run.series("tokens_per_s")
        # The first record contains the compilation.
        steps, values = _thin(steps[1:] or steps, values[1:] or values)
        if values:
            axes.plot(steps, values, color=series(i), linewidth=1.4, label=run.name)
            top = max(top, *values)
    if not top:
        return None
    axes.set_ylim(0, top * 1.1)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    legend(axes)
    return figure


def sampling_accuracy(run: RunRecord) -> Figure | None:
    """Agreement of threshold and top-k for each router of a run, against optimiser steps."""
    return _per_router(
        run, "sampling_accuracy", f"Sampling accuracy of {run.name}, by recursion", percent=True
    )


def router_scores(run: RunRecord) -> Figure | None:
    """Mean router score with a band of one standard deviation for each router of a run."""
    return _per_router(
        run, "score_mean", f"Router scores of {run.name}, by recursion", band="score_std"
    )


def depth_curve(record: Mapping[str, Any]) -> Figure:
    """Causal loss against mean depth: by the dial, and under a cap on every token's depth
    (`train.curve`)."""
    figure, axes = new_axes("Validation NLL, nats a token", "mean depth: recursions a token ran")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    own = record["as_configured"]
    for i, (key, label, marker) in enumerate(
        (("dial", "mean-depth dial", "o"), ("cap", "cap on depth", "s"))
    ):
        points = record[key]
        if points:
            x, y = [p["mean_depth"] for p in points], [p["nll"] for p in points]
            axes.plot(
                x, y, color=series(i), linewidth=1.8, marker=marker, markersize=4, label=label
            )
    for point in record["cap"]:
        axes.annotate(
            f"at most {point['max_depth']}",
            (point["mean_depth"], point["nll"]),
            xytext=(5, -13),
            textcoords="offset points",
            color=MUTED[0],
            fontsize=8.5,
        )
    axes.plot(
        [own["mean_depth"]],
        [own["nll"]],
        color=INK[0],
        linestyle="",
        marker="D",
        markersize=5,
        label="as configured",
    )
    legend(axes)
    return figure


def depth_curves(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The dial of several checkpoints: what depth does to the causal loss, a diamond where each is
    configured.

    Against the loss at depth 1, so that models of other sizes and tokens can be seen side by
    side."""
    figure, axes = new_axes(
        "Validation NLL less that at depth 1, nats",
        "mean depth: recursions a token ran, by the dial",
    )
    axes.xaxis.set_major_formatter(ScalarFormatter())
    for i, (name, record) in enumerate(curves.items()):
        dial, own = sorted(record["dial"], key=lambda p: p["asked"]), record["as_configured"]
        x, y = [p["mean_depth"] for p in dial], [p["nll"] - dial[0]["nll"] for p in dial]
        label = f"{name} ({dial[0]['nll']:.3f} at depth 1)"
        axes.plot(x, y, color=series(i), linewidth=1.8, marker="o", markersize=4, label=label)
        diamond = [own["mean_depth"]], [own["nll"] - dial[0]["nll"]]
        axes.plot(*diamond, color=series(i), linestyle="", marker="D", markersize=6)
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    legend(axes)
    return figure


def _per_router(
    run: RunRecord, key: str, title: str, band: str = "", percent: bool = False
) -> Figure | None:
    figure, axes = new_axes(title, "optimiser steps")
    lowest = 1.0
    drawn = False
    for r in range(1, run.recursions + 1):
        steps, values = run.series(f"router/{r}/{key}")
        if not values:
            continue
        drawn = True
        lines, smooth = _thin(steps, _smooth(values))
        # Colours after those of the runs: a recursion is not a run.
        colour, style = series(r + 1), ("-", (0, (5, 1.5)), (0, (2, 1.5)), "-.")[(r - 1) % 4]
        axes.plot(
            lines, smooth, color=colour, linestyle=style, linewidth=1.8, label=f"recursion {r}"
        )
        lowest = min(lowest, *smooth)
        spread_steps, spread = run.series(f"router/{r}/{band}") if band else ([], [])
        if spread and spread_steps == steps:
            _, std = _thin(steps, _smooth(spread))
            low = [max(0.0, m - s) for m, s in zip(smooth, std, strict=True)]
            high = [min(1.0, m + s) for m, s in zip(smooth, std, strict=True)]
            axes.fill_between(lines, low, high, color=colour, alpha=0.15, linewidth=0)
    if not drawn:
        return None
    if percent:
        axes.set_ylim(max(0.0, math.floor(lowest * 10 - 0.5) / 10), 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        axes.set_ylim(-0.02, 1.02)
    legend(axes)
    return figure


def _loss(
    runs: Sequence[RunRecord], xlabel: str, scale_of: Callable[[RunRecord], float | None]
) -> Figure | None:
    figure, axes = new_axes("Training loss, nats a token", xlabel)
    lowest, highest = math.inf, -math.inf
    for i, run in enumerate(runs):
        scale = scale_of(run)
        steps, values = run.series("lm_loss")
        if not values:
            steps, values = run.series("loss")
        if scale is None or not values:
            continue
        smooth = _smooth(values)
        x = [s * scale for s in steps]
        axes.plot(*_thin(x, values), color=series(i), linewidth=0.8, alpha=0.25)
        axes.plot(*_thin(x, smooth), color=series(i), linewidth=1.8, label=run.name)
        lowest = min(lowest, *values)
        # The plunge of the first steps is the same for every model and would hide the rest.
        highest = max(highest, values[min(len(values) - 1, max(1, len(values) // 12))])
    if lowest == math.inf:
        return None
    margin = 0.06 * (highest - lowest or 1)
    axes.set_ylim(lowest - margin, highest + margin)
    legend(axes)
    return figure


def _end_labels(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Write the last value (y, x, colour) of each line at its end, pushed apart where they would
    overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.055 * (top - bottom)
    place = -math.inf
    for y, x, colour in sorted(ends):
        place = max(y, place + gap)
        axes.annotate(
            units.fixed(y),
            (x, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )


def _flops_a_step(run: RunRecord) -> float | None:
    return accounting.paper_training_flops(run.config, 1) if run.config else None


def _smooth(values: Sequence[float], window: float = 0.02) -> list[float]:
    """Exponential mean over a share `window` of the points, without the pull of a zero start."""
    keep = 1 - 1 / max(1.0, window * len(values))
    mean = weight = 0.0
    out = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about MAX_POINTS of the points, the last one always among them."""
    stride = max(1, math.ceil(len(x) / MAX_POINTS))
    keep = sorted({*range(0, len(x), stride), len(x) - 1}) if x else []
    return [x[i] for i in keep], [y[i] for i in keep]
