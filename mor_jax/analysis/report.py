"""One page that shows what runs were, what they reached and what their tokens did.

The page is a single HTML file: style, figures and data inline, no script, nothing fetched, fit to
be mailed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from etils import epath
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mor_jax.analysis import palette, plots, routing_plots, tables, units
from mor_jax.analysis.canvas import to_svg
from mor_jax.analysis.depth_map import depth_map_html
from mor_jax.analysis.diff import side_by_side
from mor_jax.analysis.headline import headline
from mor_jax.analysis.runs import RunRecord
from mor_jax.analysis.token_classes import ClassLine
from mor_jax.paths import as_path, write_text

DepthMap = tuple[Sequence[str], Sequence[int], int]  # tokens, depths, max depth


def write_report(
    runs: Sequence[RunRecord],
    out: str | os.PathLike[str],
    *,
    depth_maps: Mapping[str, DepthMap] | None = None,
    samples: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    classes: Mapping[str, Sequence[ClassLine]] | None = None,
    decoded: Mapping[str, Sequence[int]] | None = None,
    curves: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "",
) -> epath.Path:
    """Write the page and return its path; missing directories are made.

    Args:
      runs: in the order of the columns; colours follow the order.
      out: the HTML file.
      depth_maps: by run name, (tokens, depths, max depth) of a sample text.
      samples: by run name, generated text.
      commands: by run name, the exact command that repeats the run.
      classes: by run name, depths by token class of held-out text.
      decoded: by run name, the depth of every token of a prompt and its continuation, for the
        growth of the cache.
      curves: by run name, what `train.curve.depth_curve` found.
      title: of the page; default from the run names.
    Raises:
      UserError: no runs.
    """
    page = render(
        runs,
        depth_maps=depth_maps,
        samples=samples,
        commands=commands,
        classes=classes,
        decoded=decoded,
        curves=curves,
        title=title,
    )
    out = as_path(out)
    write_text(out, page)  # whole: a reader who reloads never sees half a page
    return out


def render(
    runs: Sequence[RunRecord],
    *,
    depth_maps: Mapping[str, DepthMap] | None = None,
    samples: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    classes: Mapping[str, Sequence[ClassLine]] | None = None,
    decoded: Mapping[str, Sequence[int]] | None = None,
    curves: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "",
) -> str:
    """The page of `write_report` as a string."""
    rows = tables.compare(runs)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = units.duration
    template = environment.from_string(
        resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    )
    return template.render(
        title=title or " vs ".join(run.name for run in runs),
        theme=_theme(),
        headline=headline(runs),
        headers=tables.headers(runs),
        rows=rows,
        plots=[(p, Markup(to_svg(p.figure, f"p-{p.key}"))) for p in plots.all_plots(runs)],
        depth_maps=[
            (name, Markup(depth_map_html(*args))) for name, args in (depth_maps or {}).items()
        ],
        looks=[
            (p, Markup(to_svg(p.figure, f"l-{p.key}")))
            for p in _looks(runs, classes or {}, decoded or {}, curves or {})
        ],
        samples=samples or {},
        commands=commands or {},
        fields=side_by_side([run.config_dict for run in runs]),
        runs=[_facts(run) for run in runs],
    )


def _looks(
    runs: Sequence[RunRecord],
    classes: Mapping[str, Sequence[ClassLine]],
    decoded: Mapping[str, Sequence[int]],
    curves: Mapping[str, Mapping[str, Any]],
) -> list[plots.Plot]:
    """The figures that need the models, not only their records."""
    found = []
    for i, (name, lines) in enumerate(classes.items()):
        figure = routing_plots.depth_by_class(name, lines)
        if figure:
            found.append(
                plots.Plot(
                    f"class-{i}",
                    "Held-out text: share of each kind's tokens by depth; to the left their number, to the right "
                    "their mean depth and the mean loss of the predictions made at them.",
                    figure,
                )
            )
    for i, (name, curve) in enumerate(curves.items()):
        found.append(
            plots.Plot(
                f"curve-{i}",
                f"{name}, one checkpoint at many depths: the dial moves the thresholds, the cap cuts every "
                "token.",
                plots.depth_curve(curve),
            )
        )
    figure = routing_plots.kv_growth(runs, decoded)
    if figure:
        found.append(
            plots.Plot(
                "kv",
                "What the cache holds while the sample below is made. A token that stops early leaves less; the dashed "
                "line is the first routed model with every token at full depth.",
                figure,
            )
        )
    return found


def _facts(run: RunRecord) -> dict[str, object]:
    """What the page says of a run besides its numbers."""
    versions = run.summarised("versions")
    return {
        "name": run.name,
        "notes": run.notes,
        "device": run.summarised("device"),
        "seconds": run.summarised("seconds"),
        "versions": versions if isinstance(versions, Mapping) else {},
        "config": json.dumps(run.config_dict, indent=2, default=str),
    }


def _theme() -> Markup:
    """CSS variables of both themes; the same colours the figures were drawn with."""

    def variables(i: int) -> str:
        named = {"--ink": palette.INK[i], "--muted": palette.MUTED[i], "--grid": palette.GRID[i]}
        named |= {f"--s{n}": pair[i] for n, pair in enumerate(palette.SERIES)}
        return "".join(f"{name}:{value};" for name, value in named.items())

    return Markup(
        f":root{{{variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}"
    )
