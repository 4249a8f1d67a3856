"""One page that shows what runs were, what they reached and what their tokens did.

The page is a single HTML file: style, figures and data inline, no script, nothing fetched, fit to be mailed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mor_jax.analysis import palette, plots, tables, units
from mor_jax.analysis.canvas import to_svg
from mor_jax.analysis.depth_map import depth_map_html
from mor_jax.analysis.diff import side_by_side
from mor_jax.analysis.headline import headline
from mor_jax.analysis.runs import RunRecord

DepthMap = tuple[Sequence[str], Sequence[int], int]  # tokens, depths, max depth


def write_report(
    runs: Sequence[RunRecord],
    out: str | os.PathLike[str],
    *,
    depth_maps: Mapping[str, DepthMap] | None = None,
    samples: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    title: str = "",
) -> Path:
    """Write the page and return its path; missing directories are made.

    Args:
      runs: in the order of the columns; colours follow the order.
      out: the HTML file.
      depth_maps: by run name, (tokens, depths, max depth) of a sample text.
      samples: by run name, generated text.
      commands: by run name, the exact command that repeats the run.
      title: of the page; default from the run names.
    Raises:
      UserError: no runs.
    """
    page = render(runs, depth_maps=depth_maps, samples=samples, commands=commands, title=title)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved: a reader who reloads never sees half a page.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=out.parent, suffix=".tmp", delete=False) as file:
        file.write(page)
    Path(file.name).replace(out)
    out.chmod(0o644)
    return out


def render(
    runs: Sequence[RunRecord],
    *,
    depth_maps: Mapping[str, DepthMap] | None = None,
    samples: Mapping[str, str] | None = None,
    commands: Mapping[str, str] | None = None,
    title: str = "",
) -> str:
    """The page of `write_report` as a string."""
    rows = tables.compare(runs)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["duration"] = units.duration
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        title=title or " vs ".join(run.name for run in runs),
        theme=_theme(),
        headline=headline(runs),
        headers=tables.headers(runs),
        rows=rows,
        plots=[(p, Markup(to_svg(p.figure, f"p-{p.key}"))) for p in plots.all_plots(runs)],
        depth_maps=[(name, Markup(depth_map_html(*args))) for name, args in (depth_maps or {}).items()],
        samples=samples or {},
        commands=commands or {},
        fields=side_by_side([run.config_dict for run in runs]),
        runs=[_facts(run) for run in runs],
    )


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

    return Markup(f":root{{{variables(0)}}}@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}")
