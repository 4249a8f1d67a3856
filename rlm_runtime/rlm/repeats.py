"""Turns that bring nothing: replies cut while thinking, and the same again with the same
outcome."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlm_runtime.repl.base import CellResult

if TYPE_CHECKING:
    from rlm_runtime.parsing import Parsed
    from rlm_runtime.parsing.nudges import Nudge

REMEMBERED = 12  # turns: a model also goes round in circles of two or three


class Repeats:
    """Counts them for one node. `count` is 0 after a turn that brought something new; `why` is for
    the stop reason."""

    def __init__(self) -> None:
        self.count = 0
        self.why = ""
        self._cut = 0  # replies in a row
        self._cells: deque[str] = deque(maxlen=REMEMBERED)  # of the last turns with cells
        self._words = ("", 0)  # of the replies without any, and how many came in a row

    def turn(self, parsed: Parsed, report: Sequence[CellResult]) -> list[Nudge]:
        """Enter a turn; what the model is to be told where it is the second of its kind or a later
        one."""
        # Not needed before the first reply: its room is imported while that is awaited.
        from rlm_runtime.parsing.nudges import still_thinking, the_same_again

        self._cut = self._cut + 1 if parsed.cut_thinking else 0
        if self._cut:
            self.count = self._cut
            self.why = (
                f"{self._cut} replies in a row were cut off while the model was still thinking."
            )
            return [still_thinking(self._cut)] if self._cut > 1 else []
        mark = _mark(parsed, report)
        if report:
            self._cells.append(mark)
            self._words, self.count = ("", 0), self._cells.count(mark)
        else:  # words count in a row only; a cell may be gone back to
            self.count = self._words[1] + 1 if mark == self._words[0] else 1
            self._words = (mark, self.count)
        what = "cells with the same output" if report else "reply without a cell"
        self.why = f"the model repeated the same {what} ({self.count} times)."
        if self.count < 2:
            self.count = 0
            return []
        return [the_same_again(self.count, ran=bool(report))]


def _mark(parsed: Parsed, report: Sequence[CellResult]) -> str:
    """A hash of what was run and what came of it; variables count, since a cell that moves on may
    print nothing."""
    digest = hashlib.sha256()
    said = [*parsed.cells] if report else [parsed.kept]
    for result in report:
        said += [
            result.status,
            result.stdout,
            result.stderr,
            repr(result.error and result.error.message),
        ]
        said += [
            f"{result.stdout_chars} {result.answer.ready}",
            repr(sorted(result.variables.items())),
        ]
    for text in said:
        digest.update(text.encode("utf-8", "replace") + b"\0")
    return digest.hexdigest()
