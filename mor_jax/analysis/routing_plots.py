"""Figures of a report about routing: scores, capacities, balance and dead tokens over training;
depth against loss, depth by token class, and the growth of the cache in decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter, ScalarFormatter

from mor_jax.analysis import accounting, units
from mor_jax.analysis.canvas import legend, new_axes
from mor_jax.analysis.palette import DEPTH_ANCHORS, GRID, INK, MUTED, depth_colour, series
from mor_jax.analysis.runs import RunRecord
from mor_jax.analysis.token_classes import ClassLine

COLUMNS = 48  # of a histogram over training
STYLES = ("-", (0, (5, 1.5)), (0, (2, 1.5)), "-.")
_SHADES = LinearSegmentedColormap.from_list(
    "depth", [tuple(c / 255 for c in anchor) for anchor in DEPTH_ANCHORS]
)


def score_histogram(run: RunRecord) -> Figure | None:
    """Router scores over training: a column is the scores of a moment, darker where more of the
    candidates lie."""
    rows = [r for r in run.train if isinstance(r.get(f"router/{run.recursions}/histogram"), list)]
    if len(rows) < 2:
        return None
    steps = [int(r["step"]) for r in rows]
    # Where depths are chosen at once every token runs the first step: there is nothing to see of
    # its pull.
    shown = [r for r in range(1, run.recursions + 1) if r > 1 or not at_once(run)]
    figure, axes = new_axes("", height=0.8 + 1.1 * len(shown))
    figure.delaxes(axes)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    columns = np.array_split(np.arange(len(rows)), min(COLUMNS, len(rows)))
    for axes, r in zip(panels, shown, strict=True):
        values = np.array([row[f"router/{r}/histogram"] for row in rows], np.float64)
        image = np.stack([values[c].mean(axis=0) for c in columns], axis=1)
        # The root: most scores sit in a bin or two, and the rest should still be seen.
        axes.imshow(
            np.sqrt(image),
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            cmap=_SHADES,
            vmin=0,
            vmax=1,
            extent=(steps[0], steps[-1], 0, 1),
        )
        axes.axhline(0.5, color=MUTED[0], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylabel(f"recursion {r}", fontsize=9, color=MUTED[0])
        axes.set_yticks([0, 0.5, 1])
        axes.tick_params(colors=MUTED[0], labelsize=9, length=0)
        for side in axes.spines.values():
            side.set_color(GRID[0])
    panels[0].set_title(
        f"Router scores over training, {run.name}",
        loc="left",
        fontsize=10.5,
        color=INK[0],
        fontweight="bold",
        pad=10,
    )
    panels[-1].set_xlabel("optimiser steps", fontsize=9.5, color=MUTED[0])
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def capacity(run: RunRecord) -> Figure | None:
    """Share of tokens that ran each recursion: forced or chosen in training (lines), causal in
    evaluation (dots)."""
    figure, axes = new_axes(f"Tokens that run each recursion, {run.name}", "optimiser steps")
    drawn = False
    target = run.config.depth.shares(run.config.model) if run.config else ()
    for r in range(1, run.recursions + 1):
        colour = series(r + 1)
        steps, values = run.series(f"router/{r}/selected")
        if values:
            axes.plot(
                steps,
                values,
                color=colour,
                linewidth=1.4,
                linestyle=STYLES[(r - 1) % 4],
                label=f"recursion {r}",
            )
            drawn = True
        shares = [
            (e["step"], e["causal/active_share"])
            for e in run.evals
            if "step" in e and "causal/active_share" in e
        ]
        shares = [
            (step, share[r - 1])
            for step, share in shares
            if isinstance(share, list) and len(share) >= r
        ]
        if shares:
            axes.plot(
                *zip(*shares, strict=True), color=colour, linestyle="", marker="o", markersize=4.5
            )
        if target:
            axes.axhline(target[r - 1], color=GRID[0], linewidth=1)
    if not drawn:
        return None
    axes.set_ylim(-0.03, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend(axes)
    return figure


def balance(run: RunRecord) -> Figure | None:
    """How evenly a token-choice router uses the depths: each one's load, and MaxVio (largest load
    over the mean, - 1)."""
    steps, violation = run.series("router/max_vio")
    if not violation:
        return None
    figure, axes = new_axes(f"Balance of the depths, {run.name}", "optimiser steps")
    for r in range(1, run.recursions + 1):
        axes.plot(
            *run.series(f"router/{r}/load"),
            color=series(r + 1),
            linewidth=1.2,
            linestyle=STYLES[(r - 1) % 4],
            label=f"load of depth {r}",
        )
    axes.plot(steps, violation, color=INK[0], linewidth=1.2, linestyle=":", label="MaxVio")
    axes.axhline(1 / run.recursions, color=MUTED[0], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_ylim(0, max(1.0, *violation) * 1.05)
    legend(axes)
    return figure


def dead_tokens(runs: Sequence[RunRecord]) -> Figure | None:
    """Share of positions that no held-out row takes to the last recursion (top-k), over
    training."""
    figure, axes = new_axes("Dead tokens", "optimiser steps")
    highest, drawn = 0.0, False
    for i, run in enumerate(runs):
        steps, values = run.series("dead_token_ratio", "eval")
        if run.routed and values:
            axes.plot(
                steps,
                values,
                color=series(i),
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=run.name,
            )
            highest, drawn = max(highest, *values), True
    if not drawn:
        return None
    axes.set_ylim(-0.02 * max(highest, 0.05), max(highest * 1.15, 0.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    legend(axes)
    return figure


def depth_against_loss(runs: Sequence[RunRecord]) -> Figure | None:
    """Mean loss of the predictions made at tokens of each depth, decided causally; dots as large as
    the share."""
    figure, axes = new_axes("Loss by depth, nats a token", "depth: recursions a token ran")
    drawn = False
    for i, run in enumerate(runs):
        nll, share = run.last_eval("causal/depth_nll"), run.last_eval("causal/depth_share")
        if not (run.routed and isinstance(nll, list) and isinstance(share, list)):
            continue
        # Fewer than a hundredth of the tokens say little about a depth.
        points = [(d, n, s) for d, (n, s) in enumerate(zip(nll, share, strict=True)) if s >= 0.01]
        if points:
            x, y, sizes = zip(*points, strict=True)
            axes.plot(x, y, color=series(i), linewidth=1.2, label=run.name)
            axes.scatter(x, y, s=[20 + 260 * s for s in sizes], color=series(i), zorder=3)
            drawn = True
    if not drawn:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.12, y=0.2)
    legend(axes)
    return figure


def depth_by_class(name: str, lines: Sequence[ClassLine]) -> Figure | None:
    """Depths of the tokens of each class as one bar, with their number, mean depth and mean loss
    beside it."""
    if not lines:
        return None
    figure, axes = new_axes(f"Depth by kind of token, {name}", height=1.0 + 0.42 * len(lines))
    depths = len(lines[0].depth_share)
    for row, line in enumerate(lines):
        left = 0.0
        for depth, share in enumerate(line.depth_share):
            background, ink = depth_colour(depth, depths - 1)
            # An edge: the palest depth must be seen on a white page, the darkest on a dark one.
            axes.barh(row, share, 0.72, left, color=background, edgecolor=MUTED[0], linewidth=0.4)
            if share >= 0.09:
                axes.text(
                    left + share / 2,
                    row,
                    f"{depth}",
                    color=ink,
                    ha="center",
                    va="center",
                    fontsize=9,
                )
            left += share
        loss = f", loss {units.fixed(line.nll, 2)}" if line.nll is not None else ""
        axes.text(
            1.02,
            row,
            f"{units.fixed(line.mean_depth, 2)}{loss}",
            color=INK[0],
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(
        range(len(lines)), [f"{line.name} · {line.tokens}" for line in lines], color=INK[0]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.42)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="y", visible=False)
    axes.spines["bottom"].set_visible(False)
    return figure


def kv_growth(runs: Sequence[RunRecord], depths: Mapping[str, Sequence[int]]) -> Figure | None:
    """Bytes of the decode cache over a sequence, from the depths its tokens ran.

    Args:
      depths: by run name, of every token of a prompt and its continuation.
    """
    lines: list[tuple[list[float], dict[str, Any]]] = []
    for i, run in enumerate(runs):
        if run.config is None or not depths.get(run.name):
            continue
        model, depth, ran = run.config.model, run.config.depth, depths[run.name]
        lines.append(
            (
                accounting.kv_bytes_of_depths(model, depth, ran),
                {"color": series(i), "label": run.name},
            )
        )
    if not lines:
        return None
    routed = next((run for run in runs if run.routed and depths.get(run.name)), None)
    if routed and routed.config:
        model, count = routed.config.model, len(depths[routed.name])
        full = accounting.kv_bytes_of_depths(model, routed.config.depth, [model.recursions] * count)
        dashes = {"color": MUTED[0], "linestyle": (0, (4, 3)), "label": "all tokens at full depth"}
        lines.append((full, dashes))
    large = max(line[-1] for line, _ in lines) >= 4 * 2**20
    figure, axes = new_axes(
        f"KV cache in decoding, {'MiB' if large else 'KiB'}", "tokens of the sequence"
    )
    for line, style in lines:
        axes.plot(
            range(1, len(line) + 1),
            [b / 2 ** (20 if large else 10) for b in line],
            linewidth=1.8,
            **style,
        )
    axes.set_ylim(bottom=0)
    legend(axes)
    return figure


def at_once(run: RunRecord) -> bool:
    """Whether the depth of each token was decided at once, before the first step."""
    return run.config is not None and run.config.depth.at_once
