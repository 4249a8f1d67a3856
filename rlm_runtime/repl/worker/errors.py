"""An exception of a cell as the root sees it: the cell's own frames with their lines, the chain,
all of it bounded."""

from __future__ import annotations

import sys
from collections import deque

MESSAGE, TRACEBACK, FRAMES, CHAIN = 2_000, 6_000, 12, 3


def cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return (
        f"{text[: limit // 2]}\n[... {len(text) - limit:,} characters ...]\n{text[-(limit // 2) :]}"
    )


def name_of(error: BaseException) -> str:
    return cut(str(type.__dict__["__name__"].__get__(type(error))), 200)


def message_of(error: BaseException) -> str:
    """`str(error)`, whatever that does."""
    try:
        if isinstance(error, SyntaxError) and type(error).__str__ is SyntaxError.__str__:
            text = str(error.msg)
        else:
            text = str(error)
        if type(text) is not str:
            text = str.__str__(text)
    except Exception as problem:
        return f"<its message could not be read: {type(problem).__name__}>"
    notes = getattr(error, "__notes__", None)
    if isinstance(notes, list):
        text = "\n".join(
            [text, *(str.__str__(note) for note in notes[:5] if isinstance(note, str))]
        )
    return cut(text, MESSAGE)


def traceback_of(error: BaseException, sources: dict[str, list[str]]) -> str:
    """Like Python's own, with only the frames whose source is in `sources` (file name -> lines)."""
    chain, joints = [error], []
    while len(chain) < CHAIN:
        last = chain[-1]
        cause, context = last.__cause__, None if last.__suppress_context__ else last.__context__
        if (cause is None and context is None) or any((cause or context) is e for e in chain):
            break
        chain.append(context if cause is None else cause)
        joints.append(
            "While this was handled, another one came:"
            if cause is None
            else "This was the direct cause of:"
        )
    text = _one(chain.pop(), sources)
    while chain:
        text += f"\n{joints.pop()}\n\n{_one(chain.pop(), sources)}"
    return cut(text, TRACEBACK)


def _one(error: BaseException, sources: dict[str, list[str]]) -> str:
    lines, first, last, trace = [], [], deque(maxlen=FRAMES - FRAMES // 3), error.__traceback__
    count = 0
    while trace is not None:  # there may be millions
        code = trace.tb_frame.f_code
        if code.co_filename in sources:
            count += 1
            (first if len(first) < FRAMES // 3 else last).append(
                (code.co_filename, trace.tb_lineno, code.co_name)
            )
        trace = trace.tb_next
    hidden = count - len(first) - len(last)
    frames = [*first, *([hidden] if hidden else []), *last]
    if frames:
        lines.append("Traceback (most recent call last):")
    for frame in frames:
        if isinstance(frame, int):
            lines.append(f"  [... {frame} more frames ...]")
            continue
        file, number, name = frame
        lines.append(f'  File "{file}", line {number}, in {name}')
        source = sources[file]
        if 0 < number <= len(source):
            lines.append("    " + cut(source[number - 1].strip(), 300))
    if (
        isinstance(error, SyntaxError)
        and error.filename in sources
        and isinstance(error.lineno, int)
    ):
        lines += _syntax(error, sources[error.filename])
    lines.append(f"{name_of(error)}: {message_of(error)}")
    if isinstance(error, BaseExceptionGroup):
        lines += [f"  + {name_of(e)}: {cut(message_of(e), 300)}" for e in error.exceptions[:10]]
    return "\n".join(lines) + "\n"


def _syntax(error: SyntaxError, source: list[str]) -> list[str]:
    lines = [f'  File "{error.filename}", line {error.lineno}']
    if 0 < error.lineno <= len(source):
        text = source[error.lineno - 1]
        if len(text) < 300:
            lines.append("    " + text.strip())
            indent = len(text) - len(text.lstrip())
            if isinstance(error.offset, int) and error.offset > 0:
                lines.append("    " + " " * max(error.offset - 1 - indent, 0) + "^")
    return lines


def clear(error: BaseException) -> None:
    """Let go of the frames, and so of what they hold."""
    for _ in range(20):
        if error is None:
            return
        error.__traceback__ = None
        error = error.__context__
    sys.last_traceback = None
