"""Text that is safe to show."""

from __future__ import annotations


def clean(text: str) -> str:
    """Text from a model, a file or the network, made harmless for a terminal: no escape codes, no
    bidi overrides."""
    return "".join(
        c if c.isprintable() or c == "\n" else "    " if c == "\t" else "�" for c in text
    )
