"""A text with every token coloured by the number of recursions it ran: as HTML, in a terminal, as a
picture.

Tokens are the strings of a tokenizer in order; joined they are the text. Depths are 0..max_depth; 0
is a token that the first router already let go.
"""

from __future__ import annotations

import html
import io
import os
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle
from rich.text import Text

from mor_jax.analysis import units
from mor_jax.analysis.palette import MUTED, depth_colour
from mor_jax.paths import write_bytes

TAB = 4  # columns
COLUMNS = 96  # characters a line of the picture
MAX_LINES = 60  # of the picture; the rest of a longer text is cut, and says so


def depth_map_html(
    tokens: Sequence[str], depths: Sequence[int], max_depth: int, legend: bool = True
) -> str:
    """HTML fragment: the text, each token on its depth's colour with a hover title, and a legend
    with shares.

    The fragment carries its own style element and works alone, e.g. in a notebook. Everything that
    comes from a token is escaped.

    Raises:
      ValueError: lengths differ, or a depth is outside 0..max_depth.
    """
    _check(tokens, depths, max_depth)
    name = f"mor-d{max_depth}"  # fragments of several R share a page
    rules = [
        f".{name} .r{d}{{background:{bg};color:{fg}}}"
        for d, (bg, fg) in enumerate(_colours(max_depth))
    ]
    spans = [
        f'<span class="r{depth}" title="{html.escape(_visible(token))} · depth {depth}">{_body(token)}</span>'
        for token, depth in zip(tokens, depths, strict=True)
    ]
    return (
        f"<style>{_BASE_STYLE}{''.join(rules)}</style>"
        f'<div class="mor-depth {name}">{_legend(depths, max_depth) if legend else ""}'
        f'<div class="mor-text">{"".join(spans)}</div></div>'
    )


def depth_ansi(tokens: Sequence[str], depths: Sequence[int], max_depth: int) -> Text:
    """The same for a terminal: a `rich.text.Text`. Raises ValueError like `depth_map_html`."""
    _check(tokens, depths, max_depth)
    text = Text()
    colours = _colours(max_depth)
    for token, depth in zip(tokens, depths, strict=True):
        background, foreground = colours[depth]
        text.append(token, style=f"{foreground} on {background}")
    return text


def depth_legend_ansi(max_depth: int) -> Text:
    """One line that says what the colours of `depth_ansi` mean."""
    text = Text("depth ")
    for depth, (background, foreground) in enumerate(_colours(max_depth)):
        text.append(f" {depth} ", style=f"{foreground} on {background}")
    return text


def save_depth_png(
    tokens: Sequence[str], depths: Sequence[int], max_depth: int, path: str | os.PathLike[str]
) -> None:
    """The same as a PNG picture on white: COLUMNS characters a line, at most MAX_LINES lines.

    Characters the font does not have are drawn as boxes. Raises ValueError like `depth_map_html`.
    """
    _check(tokens, depths, max_depth)
    runs, lines, cut = _layout(tokens, depths)
    # inches, inches, points: DejaVu Sans Mono is 0.602 em wide
    cell_w, cell_h, size = 0.088, 0.19, 10.5
    top = 2  # lines of legend
    height = top + lines + (1 if cut else 0)
    figure = Figure(
        figsize=((COLUMNS + 4) * cell_w, (height + 1) * cell_h), dpi=160, facecolor="white"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2, COLUMNS + 2), ylim=(height + 0.5, -0.5))
    axes.set_axis_off()
    font = FontProperties(family="DejaVu Sans Mono", size=size)

    def write(x: float, y: float, text: str, colour: str) -> None:
        axes.text(
            x,
            y + 0.52,
            text,
            color=colour,
            fontproperties=font,
            va="center_baseline",
            parse_math=False,
        )

    colours = _colours(max_depth)
    x = 0
    for depth, share in enumerate(_shares(depths, max_depth)):
        label = f" depth {depth} · {units.percent(share, 0)} "
        axes.add_patch(Rectangle((x, 0), len(label), 1, color=colours[depth][0], lw=0))
        write(x, 0, label, colours[depth][1])
        x += len(label) + 1
    for column, line, text, depth in runs:
        axes.add_patch(Rectangle((column, line + top), len(text), 1, color=colours[depth][0], lw=0))
    for column, line, text, depth in runs:
        write(column, line + top, _drawable(text), colours[depth][1])
    if cut:
        write(0, top + lines, f"… {cut:,} more tokens", MUTED[0])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


_BASE_STYLE = (
    ".mor-depth{margin:0}"
    ".mor-text{font:13px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;"
    "overflow-wrap:anywhere;tab-size:4}"
    ".mor-text span{padding:2px 0}"
    ".mor-text .nl::after{content:'\\21b5';opacity:.45}"  # a mark that is seen and not copied
    ".mor-legend{display:flex;flex-wrap:wrap;gap:6px;margin:0 0 10px;font:12px/1.4 system-ui,sans-serif}"
    ".mor-legend span{padding:2px 10px;border-radius:99px}"
)


def _legend(depths: Sequence[int], max_depth: int) -> str:
    pills = "".join(
        f'<span class="r{d}">depth {d} · {units.percent(s, 0)}</span>'
        for d, s in enumerate(_shares(depths, max_depth))
    )
    return f'<div class="mor-legend">{pills}</div>'


def _body(token: str) -> str:
    return html.escape(token).replace("\n", '<i class="nl"></i>\n')


def _visible(token: str) -> str:
    """White space and control characters as escapes, so that a title shows them."""
    return (
        "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in token)
        or "(no text)"
    )


def _shares(depths: Sequence[int], max_depth: int) -> list[float]:
    return [sum(d == r for d in depths) / max(len(depths), 1) for r in range(max_depth + 1)]


def _colours(max_depth: int) -> list[tuple[str, str]]:
    return [depth_colour(d, max_depth) for d in range(max_depth + 1)]


def _layout(
    tokens: Sequence[str], depths: Sequence[int]
) -> tuple[list[tuple[int, int, str, int]], int, int]:
    """Pieces (column, line, text, depth) on a character grid, the number of lines, and how many
    tokens were cut."""
    pieces: list[tuple[int, int, str, int]] = []
    column = line = 0
    for i, (token, depth) in enumerate(zip(tokens, depths, strict=True)):
        for char in token:
            text = " " * (TAB - column % TAB) if char == "\t" else "↵" if char == "\n" else char
            if column + len(text) > COLUMNS:
                column, line = 0, line + 1
            if line >= MAX_LINES:
                return pieces, MAX_LINES, len(tokens) - i
            if pieces and pieces[-1][1:2] == (line,) and pieces[-1][3] == depth:
                start, _, before, _ = pieces[-1]
                # neighbours of one depth are one piece
                pieces[-1] = (start, line, before + text, depth)
            else:
                pieces.append((column, line, text, depth))
            column += len(text)
            if char == "\n":
                column, line = 0, line + 1
    return pieces, line + (column > 0), 0


def _drawable(text: str) -> str:
    glyphs = get_font(findfont("DejaVu Sans Mono"))
    return "".join(c if c.isprintable() and glyphs.get_char_index(ord(c)) else "□" for c in text)


def _check(tokens: Sequence[str], depths: Sequence[int], max_depth: int) -> None:
    if len(tokens) != len(depths):
        raise ValueError(
            f"{len(tokens)} tokens, but {len(depths)} depths; there must be one depth a token."
        )
    outside = [d for d in depths if not 0 <= d <= max_depth]
    if outside:
        raise ValueError(f"depth {outside[0]} is outside 0..{max_depth}.")
