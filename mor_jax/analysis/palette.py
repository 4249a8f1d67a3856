"""Colours: a few distinct ones for runs, a sequence for depth; both readable with any colour
vision."""

from __future__ import annotations

# Runs: (on a light page, on a dark page). After Okabe & Ito's set, darkened or lightened to 3:1
# against the page.
SERIES = (
    ("#0072b2", "#5eb5ef"),  # blue
    ("#d55e00", "#f28c4b"),  # vermilion
    ("#00866a", "#2fc7a2"),  # green
    ("#b0558a", "#e29ac4"),  # purple
    ("#8a6d00", "#e5c04a"),  # ochre
    ("#4a5ad0", "#99a6ff"),  # indigo
)
INK = ("#1f2328", "#e6e8eb")
MUTED = ("#5d6673", "#a2abb8")
GRID = ("#e1e4e8", "#2f353d")

# Depth: pale is shallow, dark is deep. Lightness falls steadily, so the order survives in grey.
DEPTH_ANCHORS = ((247, 246, 214), (199, 233, 180), (88, 187, 195), (34, 110, 176), (24, 38, 110))


def series(index: int) -> str:
    """Hex colour of the index-th run on a light page; colours repeat after six."""
    return SERIES[index % len(SERIES)][0]


def depth_colour(depth: int, max_depth: int) -> tuple[str, str]:
    """(background, text) hex colours of a token of this depth, 0..max_depth; the pair has a
    contrast above 4.5:1."""
    position = min(max(depth / max_depth if max_depth else 1.0, 0.0), 1.0) * (
        len(DEPTH_ANCHORS) - 1
    )
    low = min(int(position), len(DEPTH_ANCHORS) - 2)
    share = position - low
    pairs = zip(DEPTH_ANCHORS[low], DEPTH_ANCHORS[low + 1], strict=True)
    background = "#{:02x}{:02x}{:02x}".format(*(round(a + share * (b - a)) for a, b in pairs))
    dark, light = "#101418", "#ffffff"
    return background, max(dark, light, key=lambda text: contrast(background, text))


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two hex colours, 1..21."""
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
