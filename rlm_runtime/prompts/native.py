"""The words for a small model that is trained for the runtime: a prompt of about a hundred tokens,
short reports.

The same names as in `messages`, for what differs; the system prompt is in `system`. Nothing is
explained twice: such a model has learned the protocol from `rlm_runtime.training` data, and every
token here is taken from a window of one or two thousand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlm_runtime.prompts import messages
from rlm_runtime.repl.base import CellResult

OUTPUT_CHARS = 600  # of a cell: about a fifth of a window of 1,024 tokens


def first_user(
    question: str | None,
    context: str,
    *,
    budget: Mapping[str, Any] | None = None,
    tips: str | None = None,
) -> str:
    """As `messages.first_user`; the budget is not told."""
    asked = question.strip() if question and question.strip() else "(in the context)"
    tip = f"\nTips: {tips.strip()}" if tips and tips.strip() else ""
    return f"Question: {asked}\ncontext: {context}{tip}"


def next_context(question: str | None, context: str, name: str) -> str:
    """As `messages.next_context`."""
    new = f"\n{name}: {context}" if context else ""
    asked = question.strip() if question and question.strip() else "(in the context)"
    return f"Next question: {asked}{new}"


def cell_report(results: Sequence[CellResult], *, skipped: int = 0) -> str:
    """What the cells of a turn printed; of an error only its last line."""
    return "\n".join(_cell(result) for result in results) + (
        f"\nNot run: {skipped} more." if skipped else ""
    )


def _cell(result: CellResult) -> str:
    parts = [messages.fenced(result.stdout)] if result.stdout.strip() else []
    if result.error is not None:
        parts.append(f"Error: {result.error.type}: {result.error.message}")
    elif result.status != "ok":
        parts.append(f"Error: {result.status}")
    elif not parts:
        parts.append("(no output)")
    if result.lost:
        parts.append(f"Lost: {result.lost.strip()}")
    return "\n".join(parts)


def turn(number: int, limit: int | None = None) -> str:
    """Said only before the last turn."""
    return (
        "Last turn: hand in the answer."
        if limit is not None and number == limit and limit > 1
        else ""
    )
