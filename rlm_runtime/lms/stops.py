"""Stop strings for models and endpoints that do not apply them."""

from __future__ import annotations

from collections.abc import Sequence


class StopCutter:
    """Passes a growing text on up to the first stop string, holding back what may turn out to begin
    one.

    `push` returns the new text that is safe to show, `flush` what was held back when the text ends;
    `hit` is True once a stop string was found, and nothing comes after that. `text` is all that was
    returned.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(s for s in stops if s)
        self._held, self.hit = "", False
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def push(self, piece: str) -> str:
        if self.hit:
            return ""
        if not self._stops:
            return self._out(piece)
        self._held += piece
        found = [at for at in (self._held.find(s) for s in self._stops) if at >= 0]
        if found:
            self.hit = True
            safe, self._held = self._held[: min(found)], ""
            return self._out(safe)
        keep = max(
            (n for s in self._stops for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return self._out(safe)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return self._out(held)

    def _out(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text
