"""A sweep as data, and its result: mean and spread over seeds as a table, a plot, JSON and CSV.

A sweep file under configs/ablations/ returns a dict (`Sweep.from_dict` has the fields): a base
configuration, the points to run, seeds, and what to show. Numbers of a paper stand beside ours
under a heading that says at which scale they were measured; they are there for the ordering, not to
be reached.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from mor_jax.analysis import units
from mor_jax.analysis.canvas import legend, new_axes
from mor_jax.analysis.palette import GRID, INK, MUTED, series
from mor_jax.errors import ConfigError


def _fixed(value: float | None) -> str:
    return units.fixed(value, 4)


# What a run can be asked for: title, how a number is written.
COLUMNS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "causal/nll": ("NLL, causal", _fixed),
    "topk/nll": ("NLL, top-k", _fixed),
    "train_nll": ("NLL, training", _fixed),
    "causal/bits_per_byte": ("bits / byte, causal", _fixed),
    "causal/mean_depth": ("mean depth", lambda v: units.fixed(v, 2)),
    "sampling_accuracy": ("sampling acc.", units.percent),
    "dead_token_ratio": ("dead tokens", units.percent),
    "router/max_vio": ("MaxVio", lambda v: units.fixed(v, 3)),
    "router/entropy": ("entropy", lambda v: units.fixed(v, 3)),
    "non_embedding": ("unique params", units.count),
    "steps": ("steps", units.count),
    "tokens": ("tokens", units.count),
    "paper_flops": ("paper FLOPs", units.si),
    "true_flops": ("true FLOPs", units.si),
    "tokens_per_s": ("tokens / s", units.si),
}


@dataclass(frozen=True)
class Point:
    """One setting of the sweep, run once for each seed."""

    labels: Mapping[str, str]  # column: entry
    fields: Mapping[str, Any]  # configuration field, e.g. "model.sharing": value
    paper: float | None = None  # the published value of the metric

    @property
    def name(self) -> str:
        """Its directory."""
        text = "-".join(
            f"{v}" if not re.fullmatch(r"[\d.]+", v) else f"{k}{v}" for k, v in self.labels.items()
        )
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", text).strip("_-.") or "point"


@dataclass(frozen=True)
class Sweep:
    """What to run and what to show of it."""

    title: str
    base: Mapping[str, Any]  # nested configuration
    points: tuple[Point, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "causal/nll"  # of the plot, the paper's column and the ranking; lower is better
    columns: tuple[str, ...] = ()  # others to show, see COLUMNS
    x: str = ""  # a label whose entries are numbers: drawn as lines over it; "": one dot a point
    paper: str = ""  # scale of the paper's numbers: the heading of their column

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Sweep:
        """Read what a sweep file returns.

        Fields: title, base, `points` (each {"labels", "fields", "paper"}) and/or `grid` ({field:
        values}, every combination, for each point), seeds, metric, columns, x, paper.

        Raises:
          ConfigError: an unknown or missing field, two points of one name.
        """
        known = {f.name for f in dataclasses.fields(cls)} | {"grid"}
        for key in raw:
            if key not in known:
                raise ConfigError(
                    f"the sweep has a field {key!r}; valid: {', '.join(sorted(known))}."
                )
        for key in ("title", "base"):
            if key not in raw:
                raise ConfigError(f"the sweep lacks its {key!r}.")
        given = [
            Point(dict(p["labels"]), dict(p["fields"]), p.get("paper"))
            for p in raw.get("points", ())
        ]
        grid = raw.get("grid", {})
        if not given and not grid:
            raise ConfigError("the sweep has neither points nor a grid: there is nothing to run.")
        points = []
        for point in given or [Point({}, {})]:
            for values in itertools.product(*grid.values()):
                more = dict(zip(grid, values, strict=True))
                labels = {key.rpartition(".")[2]: str(value) for key, value in more.items()}
                paper = point.paper if not grid else None
                points.append(Point({**point.labels, **labels}, {**point.fields, **more}, paper))
        names = [p.name for p in points]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ConfigError(
                f"two points of the sweep are called {twice!r}; give them different labels."
            )
        rest = {key: raw[key] for key in ("metric", "x", "paper") if key in raw}
        sweep = cls(title=raw["title"], base=raw["base"], points=tuple(points), **rest)
        sweep = dataclasses.replace(
            sweep, seeds=tuple(raw.get("seeds", sweep.seeds)), columns=tuple(raw.get("columns", ()))
        )
        for column in (sweep.metric, *sweep.columns):
            if column not in COLUMNS:
                raise ConfigError(f"the sweep shows {column!r}; a run has {', '.join(COLUMNS)}.")
        if not sweep.seeds:
            raise ConfigError("the sweep has no seeds; give at least one.")
        return sweep

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for p in self.points for name in p.labels))


@dataclass(frozen=True)
class Outcome:
    """One run: its numbers, or why it has none."""

    point: Point
    seed: int
    values: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    failure: str = ""  # a diverged run is a result too


@dataclass(frozen=True)
class Line:
    """A point over its seeds."""

    point: Point
    values: Mapping[str, tuple[float, ...]]  # one a seed that finished
    runs: int
    failures: int

    def mean(self, column: str) -> float | None:
        found = self.values.get(column, ())
        return statistics.fmean(found) if found else None

    def spread(self, column: str) -> float | None:
        """Standard deviation over seeds (of a sample); None for fewer than two."""
        found = self.values.get(column, ())
        return statistics.stdev(found) if len(found) > 1 else None


def summarise(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Line]:
    """One line a point, in the order of the sweep; points without a run yet are left out."""
    lines = []
    for point in sweep.points:
        mine = [o for o in outcomes if o.point.name == point.name]
        good = [o for o in mine if not o.failure]
        if mine:
            values = {c: _numbers(good, c) for c in COLUMNS}
            lines.append(Line(point, values, len(mine), len(mine) - len(good)))
    return lines


def _numbers(outcomes: Sequence[Outcome], column: str) -> tuple[float, ...]:
    given = (o.values.get(column) for o in outcomes)
    return tuple(float(v) for v in given if v is not None and math.isfinite(v))


def cells(sweep: Sweep, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table as text. Only columns of which some run has a number."""
    columns = [
        c for c in (sweep.metric, *sweep.columns) if any(line.values.get(c) for line in lines)
    ]
    with_paper = any(line.point.paper is not None for line in lines)
    header = [*sweep.label_names, "seeds", *(COLUMNS[c][0] for c in columns)]
    header += [f"paper: {sweep.paper}" if sweep.paper else "paper"] * with_paper
    rows = []
    for line in lines:
        row = [str(line.point.labels.get(name, "")) for name in sweep.label_names]
        row.append(
            str(line.runs) if not line.failures else f"{line.runs}, {line.failures} diverged"
        )
        for column in columns:
            write = COLUMNS[column][1]
            mean, spread = line.mean(column), line.spread(column)
            # The spread of what the seed cannot change is nothing to read.
            row.append(write(mean) + (f" ± {write(spread)}" if spread else ""))
        rows.append([*row, *[_fixed(line.point.paper)] * with_paper])
    return header, rows


def best(sweep: Sweep, lines: Sequence[Line]) -> int | None:
    """Index of the line with the lowest mean of the metric."""
    means = [(m, i) for i, line in enumerate(lines) if (m := line.mean(sweep.metric)) is not None]
    return min(means)[1] if len(means) > 1 else None


def to_table(sweep: Sweep, outcomes: Sequence[Outcome]) -> Table:
    """For a terminal."""
    lines = summarise(sweep, outcomes)
    header, rows = cells(sweep, lines)
    table = Table(
        title=sweep.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        caption=note(sweep),
        caption_justify="left",
    )
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < len(sweep.label_names) else "right")
    winner, place = best(sweep, lines), len(sweep.label_names) + 1
    for n, row in enumerate(rows):
        table.add_row(
            *(
                Text(c, style="bold green" if n == winner and i == place else "")
                for i, c in enumerate(row)
            )
        )
    return table


def to_markdown(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """A GitHub table, the lowest mean of the metric bold."""
    lines = summarise(sweep, outcomes)
    header, rows = cells(sweep, lines)
    winner, place = best(sweep, lines), len(sweep.label_names) + 1
    if winner is not None:
        rows[winner][place] = f"**{rows[winner][place]}**"

    def text(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in row) + " |"

    rule = "|" + "---|" * len(sweep.label_names) + "---:|" * (len(header) - len(sweep.label_names))
    return "\n".join(
        [f"# {sweep.title}", "", text(header), rule, *map(text, rows), "", note(sweep), ""]
    )


def note(sweep: Sweep) -> str:
    """What the numbers are, under every table."""
    said = "Mean ± standard deviation over seeds. Ours on held-out text at the size of this sweep."
    if any(p.paper is not None for p in sweep.points):
        said += f" The paper's column is of another scale ({sweep.paper}): compare the ordering, not the values."
    return said


def to_csv(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """One row a run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*sweep.label_names, "seed", *COLUMNS, "paper", "failure"])
    for o in outcomes:
        values = ["" if (v := o.values.get(c)) is None else v for c in COLUMNS]
        labels = [o.point.labels.get(n, "") for n in sweep.label_names]
        writer.writerow(
            [*labels, o.seed, *values, "" if o.point.paper is None else o.point.paper, o.failure]
        )
    return out.getvalue()


def to_json(sweep: Sweep, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything: what was asked, each run, each point's mean and spread."""
    shown = (sweep.metric, *sweep.columns)
    return {
        "title": sweep.title,
        "metric": sweep.metric,
        "paper": sweep.paper,
        "runs": [
            {
                "labels": dict(o.point.labels),
                "fields": dict(o.point.fields),
                "seed": o.seed,
                "values": dict(o.values),
                "failure": o.failure,
            }
            for o in outcomes
        ],
        "points": [
            {
                "labels": dict(line.point.labels),
                "seeds": line.runs,
                "diverged": line.failures,
                "paper": line.point.paper,
                "mean": {c: line.mean(c) for c in shown},
                "spread": {c: line.spread(c) for c in shown},
            }
            for line in summarise(sweep, outcomes)
        ],
    }


def plot(sweep: Sweep, outcomes: Sequence[Outcome]) -> Figure:
    """The metric: lines over `sweep.x`, or one row a point, with every seed's own value behind its
    mean ± spread."""
    lines = [line for line in summarise(sweep, outcomes) if line.values.get(sweep.metric)]
    title = f"{COLUMNS[sweep.metric][0]}: {sweep.title}"
    if sweep.x:
        figure, axes = new_axes(title, sweep.x)
        others = [n for n in sweep.label_names if n != sweep.x]
        groups: dict[str, list[Line]] = {}
        for line in lines:
            groups.setdefault(" ".join(line.point.labels.get(n, "") for n in others), []).append(
                line
            )
        for i, (name, group) in enumerate(groups.items()):
            x = [float(line.point.labels[sweep.x]) for line in group]
            y, error = zip(
                *((line.mean(sweep.metric), line.spread(sweep.metric) or 0.0) for line in group),
                strict=True,
            )
            axes.errorbar(
                x,
                y,
                yerr=error,
                color=series(i),
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.8,
                label=name,
            )
        ticks = sorted({float(line.point.labels[sweep.x]) for line in lines})
        if len(ticks) > 1:
            axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(ticks, [units.si(t) if t >= 1000 else f"{t:g}" for t in ticks])
        legend(axes)
        return figure
    figure, axes = new_axes(title, height=1.2 + 0.28 * max(len(lines), 1))
    for row, line in enumerate(lines):
        values, mean = line.values[sweep.metric], line.mean(sweep.metric)
        axes.plot(values, [row] * len(values), "|", color=MUTED[0], markersize=8)
        axes.errorbar(
            [math.nan if mean is None else mean],
            [row],
            xerr=[line.spread(sweep.metric) or 0.0],
            fmt="o",
            color=series(0),
            capsize=3,
        )
    axes.set_yticks(
        range(len(lines)), [" ".join(line.point.labels.values()) for line in lines], color=INK[0]
    )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID[0], linewidth=0.8)
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    return figure
