"""stdout and stderr of a cell, caught where they are written: bounded memory, head and tail for the
root to see."""

from __future__ import annotations

import io


class Capture(io.TextIOBase):
    """A text stream that keeps the first `kept` characters and the last `tail` ones.

    `mirror`: memory the host can see, for the first bytes of it; what a worker that dies has said
    is not lost.
    """

    encoding, errors, newlines = "utf-8", "backslashreplace", None

    def __init__(self, name: str, fd: int, kept: int, tail: int, mirror: memoryview | None = None):
        self.name, self.mode = name, "w"
        self._fd, self._kept, self._tail_size = fd, kept, max(tail, 1)
        self._mirror = mirror
        self.buffer = _Bytes(self)
        self.clear()

    def clear(self) -> None:
        self.chars, self._room = 0, self._kept
        self._head: list[str] = []
        self._tail: list[str] = []
        self._tail_chars = 0
        self._mirrored = -1 if self._mirror is None else 8
        self._mirror_up_to(8)

    def _mirror_up_to(self, end: int) -> None:
        if self._mirror is not None:
            self._mirrored = end
            self._mirror[:8] = (end - 8).to_bytes(8, "little")

    def _reflect(self, text: str) -> None:
        room = len(self._mirror) - self._mirrored
        data = text[:room].encode("utf-8", "replace")[:room]
        self._mirror[self._mirrored : self._mirrored + len(data)] = data
        self._mirror_up_to(self._mirrored + len(data))
        if len(data) == room:
            self._mirrored = -1

    def write(self, text) -> int:
        if type(text) is not str:
            if not isinstance(text, str):
                raise TypeError(f"write() argument must be str, not {type(text).__name__}")
            text = str.__str__(text)
        length = len(text)
        self.chars += length
        if self._mirrored >= 0:
            self._reflect(text)
        if self._room > 0:
            self._head.append(text if length <= self._room else text[: self._room])
            self._room -= length
            if self._room >= 0:
                return length
            text = text[self._room :]  # what went beyond the room
            self._room = 0
        self._tail.append(text[-self._tail_size :])
        self._tail_chars += len(self._tail[-1])
        if self._tail_chars > 4 * self._tail_size or len(self._tail) > 10_000:
            self._tail = ["".join(self._tail)[-self._tail_size :]]
            self._tail_chars = len(self._tail[0])
        return length

    def kept(self) -> str:
        """Everything up to `kept` characters; beyond that the beginning and the end, with a note in
        between."""
        head, tail = "".join(self._head), "".join(self._tail)[-self._tail_size :]
        hidden = self.chars - len(head) - len(tail)
        if hidden <= 0:
            return head + tail
        return f"{head}\n[... {hidden:,} characters were not kept ...]\n{tail}"

    def shown(self, limit: int, where: str | None) -> str:
        """What the root sees: at most `limit` characters of it, cut in the middle."""
        if self.chars <= limit:
            return "".join(self._head) + "".join(self._tail)
        front, back = limit - limit // 2, limit // 2
        head, tail = "".join(self._head), "".join(self._tail)
        end = (head + tail if len(tail) < back else tail)[-back:] if back else ""
        return f"{head[:front]}\n{banner(self.chars - front - len(end), where, self.chars > self._kept)}\n{end}"

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass  # the next cell writes here again

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def reconfigure(self, **kwargs) -> None:
        pass


def keeper(streams: tuple[Capture, ...]):
    """A function that puts these streams and their classes back to what they are now, whatever a
    cell did to them."""
    objects = [(vars(o), dict(vars(o))) for stream in streams for o in (stream, stream.buffer)]
    classes = [(c, dict(vars(c))) for c in (Capture, _Bytes)]

    def restore() -> None:
        for now, then in objects:
            now.clear()
            now.update(then)
        for c, then in classes:
            for name in [name for name in vars(c) if name not in then]:
                delattr(c, name)
            for name, value in then.items():
                if vars(c)[name] is not value:
                    setattr(c, name, value)
        for stream in streams:
            stream.clear()

    return restore


def banner(hidden: int, where: str | None, lossy: bool = False) -> str:
    """The line in place of what was cut."""
    if where is None:
        return f"[... {hidden:,} characters hidden ...]"
    holds = "holds the beginning and the end" if lossy else "holds all of it"
    return f"[... {hidden:,} characters hidden; the variable {where} {holds} ...]"


class _Bytes(io.RawIOBase):
    """`sys.stdout.buffer`: bytes that join the text."""

    def __init__(self, text: Capture):
        self._text = text

    def write(self, data) -> int:
        data = bytes(data)
        self._text.write(data.decode("utf-8", "backslashreplace"))
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._text.fileno()

    def close(self) -> None:
        pass
