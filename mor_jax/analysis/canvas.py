"""A matplotlib figure that goes into a page: no pyplot, no global state, colours that follow the
page's theme."""

from __future__ import annotations

import io
import os
import re

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from mor_jax.analysis.palette import GRID, INK, MUTED, SERIES
from mor_jax.paths import write_bytes

# Colours the figures draw with, and the CSS variables a page may give them. The fallback keeps a
# figure that stands alone, e.g. in a notebook, as it is.
_VARIABLES = {
    INK[0]: "--ink",
    MUTED[0]: "--muted",
    GRID[0]: "--grid",
    **{light: f"--s{i}" for i, (light, _) in enumerate(SERIES)},
}


def new_axes(
    title: str, xlabel: str = "", width: float = 5.6, height: float = 3.2
) -> tuple[Figure, Axes]:
    """An empty figure of width x height inches with one quiet axis; the title says what the y axis
    shows."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10.5, color=INK[0], fontweight="bold", pad=10)
    axes.set_xlabel(xlabel, fontsize=9.5, color=MUTED[0])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # steps and FLOPs: 5k, 2P
    axes.tick_params(colors=MUTED[0], labelsize=9, length=0)
    axes.grid(axis="y", color=GRID[0], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID[0])
    return figure, axes


def legend(axes: Axes) -> None:
    """Name the lines, without a frame; nothing when none has a name."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK[0], handlelength=1.8)


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an inline `<svg>` element that scales to the width of its container.

    Text stays text; theme colours become CSS variables (`--ink`, `--muted`, `--grid`, `--s0`..);
    nothing refers to anything outside, not even a namespace.

    Args:
      name: prefix of all ids, unique on the page.
    """
    _show_lone_points(figure)
    buffer = io.StringIO()
    # A context: the settings are back to what they were for whoever else draws in this process.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # an HTML parser knows the namespaces of inline SVG
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    # An image is named after its content, so that two alike would share a name; nothing refers to
    # it.
    svg = re.sub(r'(<image\b[^>]*?)\sid="[^"]*"', r"\1", svg)
    svg = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d. a-z]*?)([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg


def save_png(figure: Figure, path: str | os.PathLike[str], dpi: int = 160) -> None:
    """The figure as a PNG on white."""
    _show_lone_points(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    write_bytes(path, buffer.getvalue())


def _show_lone_points(figure: Figure) -> None:
    """A line of one point has no length; it gets a marker, so that a run of one record shows."""
    for axes in figure.axes:
        for line in axes.get_lines():
            points = np.isfinite(np.asarray(line.get_ydata(orig=False), float))
            if points.sum() == 1 and line.get_marker() in ("None", None, "", " "):
                line.set_marker("o")
                line.set_markersize(5)
