"""Score, cost, calls and time by length, a figure a task. matplotlib is imported when a figure is
drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlm_runtime.tasks.results import TaskSummary, size_name

COLORS = ("#3b6ea5", "#d1495b", "#2a9d6f", "#8a5fbf", "#b07d2b", "#5c677d")
MARKS = "os^Dv*"


def draw(out: Path, summaries: Sequence[TaskSummary]) -> list[Path]:
    """Writes `<task>.png` for each task; returns the files."""
    tasks = list(dict.fromkeys(s.task for s in summaries))
    return [
        _figure(out / f"{task}.png", task, [s for s in summaries if s.task == task])
        for task in tasks
    ]


def _figure(path: Path, task: str, summaries: list[TaskSummary]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    panels = (
        ("score", "score"),
        ("cost_usd", "dollars a run"),
        ("calls", "model calls a run"),
        ("seconds", "seconds a run"),
    )
    lengths = sorted({s.length for s in summaries})
    modes = list(dict.fromkeys(s.mode for s in summaries))
    for axis, (field, title) in zip(axes.flat, panels, strict=True):
        drawn = False
        for k, mode in enumerate(modes):
            points = sorted(
                (s for s in summaries if s.mode == mode and s.score is not None),
                key=lambda s: s.length,
            )
            points = [s for s in points if getattr(s, field) is not None]
            if not points:
                continue
            drawn = True
            y = [getattr(s, field) for s in points]
            # side by side where they agree
            x = [s.length * 1.05 ** (k - (len(modes) - 1) / 2) for s in points]
            style = {
                "color": COLORS[k % len(COLORS)],
                "marker": MARKS[k % len(MARKS)],
                "label": mode,
                "markersize": 5,
            }
            if field == "score":
                ends = [
                    [v - s.low for v, s in zip(y, points, strict=True)],
                    [s.high - v for v, s in zip(y, points, strict=True)],
                ]
                axis.errorbar(
                    x,
                    y,
                    yerr=[[max(0.0, e) for e in side] for side in ends],
                    capsize=3,
                    elinewidth=1,
                    **style,
                )
            else:
                axis.plot(x, y, **style)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xscale("log")
        axis.set_xticks(
            lengths, [size_name(n) for n in lengths], rotation=30 if len(lengths) > 6 else 0
        )
        axis.minorticks_off()
        axis.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if field == "score":
            axis.set_ylim(-0.03, 1.03)
        elif drawn:
            axis.set_ylim(bottom=0)
        else:
            axis.text(0.5, 0.5, "not known", transform=axis.transAxes, ha="center", color="0.5")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if handles:
        axes.flat[0].legend(handles, labels, frameon=False, fontsize=9)
    figure.suptitle(f"{task}, by length of the context in tokens", fontsize=11, x=0.02, ha="left")
    figure.savefig(path, dpi=130)
    return path
