"""Server-sent events out of a stream of bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple


class ServerEvent(NamedTuple):
    event: str  # "" where the server names none
    data: str


class TooLong(ValueError):
    """An event that is longer than its reader allows."""


async def events(chunks: AsyncIterator[bytes], longest: int) -> AsyncIterator[ServerEvent]:
    r"""Events as they complete. Comments and other fields are skipped; lines end in \n, \r\n or \r.

    Raises TooLong for one of more than `longest` bytes. The stream may end without the empty line
    after the last event; a line it ends in the middle of is dropped.
    """
    name, size = "", 0
    data: list[str] = []
    async for line in _lines(chunks, longest):
        size += len(line)
        if size > longest:
            raise TooLong
        field, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode("utf-8", "replace")
        if not line:
            if data:
                yield ServerEvent(name, "\n".join(data))
            name, data, size = "", [], 0
        elif field == b"data":
            data.append(text)
        elif field == b"event":
            name = text
    if data:
        yield ServerEvent(name, "\n".join(data))


async def _lines(chunks: AsyncIterator[bytes], longest: int) -> AsyncIterator[bytes]:
    parts: list[bytes] = []  # of the line that is not whole yet
    size = 0
    after_cr = False
    async for chunk in chunks:
        if after_cr and chunk.startswith(b"\n"):  # a \r\n cut in two
            chunk = chunk[1:]
        if not chunk:
            continue
        after_cr = chunk.endswith(b"\r")
        first, *rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        parts.append(first)
        size = len(rest[-1]) if rest else size + len(first)
        if size > longest:
            raise TooLong
        if rest:
            yield b"".join(parts)
            for line in rest[:-1]:
                yield line
            parts = [rest[-1]]
