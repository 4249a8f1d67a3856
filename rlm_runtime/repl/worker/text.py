"""The `context` of a cell when it is too big to be an ordinary string: a lazy text that behaves as
a `str`, read in blocks.

Standard library only: this file runs inside the confined worker. Blocks are read with `pread` and
not mapped, so a scan of a whole gigabyte file never counts as resident memory. A text knows how
many characters lie before a block only as far as somebody had to ask, so opening costs nothing
whatever the size.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import json
import operator
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator

try:  # as part of the package, or beside this file when the worker is started by path
    from . import textsearch
    from .folder import Folder
except ImportError:
    import textsearch
    from folder import Folder

BLOCK = 256 << 10  # bytes decoded at a time
KEPT = 8  # decoded blocks kept
STEP = 1 << 20  # characters a scan looks at together
STR_LIMIT = 256 << 20  # a text of more bytes is not turned into one str
SLICE_LIMIT = 64 << 20  # a slice of more characters is a view, not a str
LAZY_BYTES = 256 << 20  # files up to this size become a true str


class Blocks:
    """A UTF-8 file as blocks of whole characters. Invalid bytes read as U+FFFD.

    Each block is decoded by itself and its borders depend on the bytes around them only, so every
    operation sees the same characters at the same places, invalid bytes or not.
    """

    def __init__(
        self, fd: int, *, size: int | None = None, block: int = BLOCK, owned: bool = False
    ):
        self.fd, self.owned, self.nominal = fd, owned, block
        self.size = os.fstat(fd).st_size if size is None else size
        # a byte order mark is not text
        self.base = 3 if os.pread(fd, 3, 0) == b"\xef\xbb\xbf" else 0
        self.before = [0]  # before[k]: characters in front of block k, as far as known
        self.edges = [self.base]  # edges[k]: byte offset of block k, as far as known
        self.kept: OrderedDict[int, str] = OrderedDict()

    def __del__(self):
        if getattr(self, "owned", False):
            with contextlib.suppress(OSError):
                os.close(self.fd)

    @property
    def done(self) -> bool:
        return self.edges[-1] >= self.size

    def _edge_after(self, offset: int) -> int:
        """Where the block that starts at `offset` ends: a character border near `nominal` bytes
        on."""
        end = offset + max(self.nominal, 4)
        if end >= self.size:
            return self.size
        around = os.pread(self.fd, 4, end - 3)
        for back in range(len(around)):  # the byte at `end`, then up to three in front of it
            if around[len(around) - 1 - back] & 0xC0 != 0x80:
                return end - back
        return end

    def _bytes(self, start: int, end: int) -> bytes:
        data = os.pread(self.fd, end - start, start)
        while len(data) < end - start:  # a read may be cut short by a signal
            more = os.pread(self.fd, end - start - len(data), start + len(data))
            if not more:
                raise OSError(
                    "the file behind this text has become shorter while it was being read"
                )
            data += more
        return data

    def _advance(self, keep: bool) -> None:
        """Index one block more."""
        k, start = len(self.edges) - 1, self.edges[-1]
        end = self._edge_after(start)
        data = self._bytes(start, end)
        if data.isascii() and not keep:
            chars = len(data)
        else:
            text = data.decode("utf-8", "replace")
            chars = len(text)
            if keep:
                self._keep(k, text)
        self.edges.append(end)
        self.before.append(self.before[-1] + chars)

    def _keep(self, k: int, text: str) -> None:
        self.kept[k] = text
        if len(self.kept) > KEPT:
            self.kept.popitem(last=False)

    def block(self, k: int) -> str:
        if k in self.kept:
            self.kept.move_to_end(k)
            return self.kept[k]
        if k == len(self.edges) - 1:
            self._advance(keep=True)
            return self.kept[k]
        text = self._bytes(self.edges[k], self.edges[k + 1]).decode("utf-8", "replace")
        self._keep(k, text)
        return text

    def total(self) -> int:
        while not self.done:
            self._advance(keep=False)
        return self.before[-1]

    def at(self, position: int) -> int:
        """The block that holds character `position`; the number of blocks if the text ends before
        it."""
        while self.before[-1] <= position and not self.done:
            self._advance(keep=False)
        if self.before[-1] <= position:
            return len(self.edges) - 1
        return bisect.bisect_right(self.before, position) - 1

    def read(self, start: int, stop: int) -> str:
        """Characters start..stop, fewer at the end of the text."""
        if stop <= start:
            return ""
        k, pieces = self.at(start), []
        while start < stop and not (k == len(self.edges) - 1 and self.done):
            block = self.block(k)
            first = start - self.before[k]
            pieces.append(block[first : first + stop - start])
            start += len(pieces[-1])
            k += 1
        return pieces[0] if len(pieces) == 1 else "".join(pieces)


class Text:
    """A long text in a file, with the methods of `str`; positions count characters.

    Besides what `str` has: `lines()`, `chunks(size, overlap)`, and `search`, `match`, `fullmatch`,
    `finditer`, `findall` with a pattern (the functions of `re` take a Text too). Slices are plain
    strings.
    """

    def __init__(self, blocks: Blocks, start: int = 0, stop: int | None = None, name: str = ""):
        self._blocks, self._start, self._stop, self.name = blocks, start, stop, name

    @classmethod
    def open(cls, path: str | int, *, block: int = BLOCK, name: str = "") -> Text:
        """Raises OSError where the file cannot be opened."""
        if isinstance(path, int):
            return cls(Blocks(path, block=block), name=name)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return cls(Blocks(fd, block=block, owned=True), name=name or os.path.basename(path))

    # -- reading

    @property
    def nbytes(self) -> int:
        """Bytes of the file (of a view: at most)."""
        if self._stop is None and self._start == 0:
            return self._blocks.size - self._blocks.base
        return min(self._blocks.size, 4 * len(self))

    def _read(self, start: int, stop: int) -> str:
        """Characters start..stop, fewer at the end; never needs the length of the text."""
        last = self._start + stop if self._stop is None else min(self._start + stop, self._stop)
        return self._blocks.read(self._start + start, last)

    def _step(self) -> int:
        return max(1, min(STEP, 4 * self._blocks.nominal))

    def _windows(self, start: int, stop: int | None, overlap: int = 0) -> Iterator[tuple[int, str]]:
        """(position, characters) one after the other; each repeats the last `overlap` characters of
        the one before."""
        step = max(self._step(), 4 * overlap)
        while True:
            end = start + step if stop is None else min(start + step, stop)
            piece = self._read(start, end)
            if piece:
                yield start, piece
            if len(piece) < step or (stop is not None and start + len(piece) >= stop):
                return
            start += len(piece) - overlap

    def _small(self, what: str) -> str:
        if self.nbytes > STR_LIMIT:
            raise ValueError(
                f"{what} would make one string of a text of {self.nbytes:,} bytes. Work on pieces instead: a slice "
                "text[a:b], text.lines(), text.chunks(size, overlap), text.find(...), text.finditer(pattern)."
            )
        return self._read(0, len(self))

    def __len__(self) -> int:
        if self._stop is None:
            self._stop = max(self._blocks.total(), self._start)
        return self._stop - self._start

    def __bool__(self) -> bool:
        return bool(self._read(0, 1))

    def __getitem__(self, key):
        if isinstance(key, slice):
            return self._slice(key)
        position = operator.index(key)
        if position < 0:
            position += len(self)
        char = self._read(position, position + 1) if position >= 0 else ""
        if not char:
            raise IndexError("text index out of range")
        return char

    def _slice(self, key: slice):
        step = 1 if key.step is None else key.step.__index__()
        forward = (
            step == 1 and key.stop is not None and (key.start is None or key.start.__index__() >= 0)
        )
        if forward and 0 <= key.stop.__index__() <= SLICE_LIMIT:
            return self._read(key.start or 0, key.stop)  # without asking for the length
        start, stop, step = key.indices(len(self))
        if step == 1:
            if stop - start > SLICE_LIMIT:
                return Text(self._blocks, self._start + start, self._start + stop, self.name)
            return self._read(start, stop)
        count = len(range(start, stop, step))
        if count > STR_LIMIT:
            raise ValueError(
                f"a slice of {count:,} characters is too long for one string; use text.chunks(size)."
            )
        if step < 0:  # the same characters forwards, turned round
            start, stop = start + (count - 1) * step, start + 1
        pieces, stride = [], abs(step)
        for position, piece in self._windows(start, stop):
            pieces.append(piece[-(position - start) % stride :: stride])
        return "".join(pieces) if step > 0 else "".join(pieces)[::-1]

    def __iter__(self) -> Iterator[str]:
        for _, piece in self._windows(0, None):
            yield from piece

    def lines(self, keepends: bool = False) -> Iterator[str]:
        """The lines one by one, cut where `str.splitlines` cuts."""
        held: list[str] = []  # pieces of a line whose end has not been read
        for _, piece in self._windows(0, None):
            if held and held[-1].endswith("\r"):  # may be half of a "\r\n"
                piece = held.pop() + piece
            parts = piece.splitlines(True)
            if len(parts) > 1:
                yield from ("".join([*held, parts[0]]).splitlines(keepends))
                for part in parts[1:-1]:
                    yield part if keepends else part.splitlines()[0]
                held = []
            held.append(parts[-1])
            if len(held[-1].splitlines()[0]) < len(held[-1]) and not held[-1].endswith("\r"):
                yield from "".join(held).splitlines(keepends)
                held = []
        if held:
            yield from "".join(held).splitlines(keepends)

    def chunks(self, size: int, overlap: int = 0) -> Iterator[str]:
        """Pieces of `size` characters, each repeating the last `overlap` of the one before; the
        last may be shorter."""
        if size < 1 or not 0 <= overlap < size:
            raise ValueError(
                f"chunks need size >= 1 and 0 <= overlap < size, not size={size}, overlap={overlap}."
            )
        start = 0
        while piece := self._read(start, start + size):
            yield piece
            if len(piece) < size or not self._read(start + size, start + size + 1):
                return
            start += size - overlap

    # -- searching

    def _bounds(self, start, end) -> tuple[int, int | None]:
        """Bounds as `str.find` takes them, without the length of the text where it is not
        needed."""
        start = 0 if start is None else start.__index__()
        end = None if end is None else end.__index__()
        if start < 0:
            start = max(0, start + len(self))
        if end is not None and end < 0:
            end = max(0, end + len(self))
        return start, end

    def _needle(self, sub) -> str:
        if isinstance(sub, Text):
            return sub._small("a search for this text")
        if not isinstance(sub, str):
            raise TypeError(f"must be str, not {type(sub).__name__}")
        return sub

    def find(self, sub, start=None, end=None) -> int:
        sub = self._needle(sub)
        start, end = self._bounds(start, end)
        if not sub:
            length = len(self)
            return start if start <= (length if end is None else min(end, length)) else -1
        for position, piece in self._windows(start, end, len(sub) - 1):
            found = piece.find(sub)
            if found >= 0:
                return position + found
        return -1

    def rfind(self, sub, start=None, end=None) -> int:
        sub = self._needle(sub)
        first, last = self._bounds(start, end)
        last = len(self) if last is None else min(last, len(self))
        if not sub:
            return last if first <= last else -1
        step = max(self._step(), 4 * len(sub))
        while last - first >= len(sub):
            begin = max(first, last - step)
            found = self._read(begin, last).rfind(sub)
            if found >= 0:
                return begin + found
            if begin == first:
                return -1
            last = begin + len(sub) - 1
        return -1

    def index(self, sub, start=None, end=None) -> int:
        found = self.find(sub, start, end)
        if found < 0:
            raise ValueError("substring not found")
        return found

    def rindex(self, sub, start=None, end=None) -> int:
        found = self.rfind(sub, start, end)
        if found < 0:
            raise ValueError("substring not found")
        return found

    def count(self, sub, start=None, end=None) -> int:
        sub = self._needle(sub)
        first, last = self._bounds(start, end)
        if not sub:
            length = len(self)
            return (
                max(0, (length if last is None else min(last, length)) - first + 1)
                if first <= length
                else 0
            )
        overlap = len(sub) - 1
        if len(sub) < 1000 and not any(sub.startswith(sub[i:]) for i in range(1, len(sub))):
            # occurrences cannot overlap, so each lies in exactly one window
            return sum(piece.count(sub) for _, piece in self._windows(first, last, overlap))
        total, following = 0, first
        for position, piece in self._windows(first, last, overlap):
            while (found := piece.find(sub, max(0, following - position))) >= 0:
                total += 1
                following = position + found + len(sub)
        return total

    def startswith(self, prefix, start=None, end=None) -> bool:
        if isinstance(prefix, tuple):
            return any(self.startswith(p, start, end) for p in prefix)
        prefix = self._needle(prefix)
        first, last = self._bounds(start, end)
        if not prefix:
            return self.find("", start, end) >= 0
        stop = first + len(prefix)
        return (last is None or stop <= last) and self._read(first, stop) == prefix

    def endswith(self, suffix, start=None, end=None) -> bool:
        if isinstance(suffix, tuple):
            return any(self.endswith(s, start, end) for s in suffix)
        suffix = self._needle(suffix)
        first, last, _ = slice(start, end).indices(len(self))
        if not suffix:
            return self.find("", start, end) >= 0
        return last - len(suffix) >= first and self._read(last - len(suffix), last) == suffix

    def __contains__(self, sub) -> bool:
        if not isinstance(sub, (str, Text)):
            raise TypeError(
                f"'in <text>' requires string as left operand, not {type(sub).__name__}"
            )
        return self.find(sub) >= 0

    def search(self, pattern, pos: int = 0, endpos: int | None = None, flags: int = 0):
        """The first match as `re` gives it, with positions in this text; None without one.

        Raises ValueError where the pattern can match without bound and the text is too long to hold
        as one string.
        """
        return next(textsearch.finditer(self._upto(endpos), pattern, pos, flags), None)

    def match(self, pattern, pos: int = 0, endpos: int | None = None, flags: int = 0):
        return textsearch.match(self._upto(endpos), pattern, pos, flags)

    def fullmatch(self, pattern, pos: int = 0, endpos: int | None = None, flags: int = 0):
        return textsearch.fullmatch(self._upto(endpos), pattern, pos, flags)

    def finditer(self, pattern, pos: int = 0, endpos: int | None = None, flags: int = 0):
        return textsearch.finditer(self._upto(endpos), pattern, pos, flags)

    def findall(self, pattern, pos: int = 0, endpos: int | None = None, flags: int = 0) -> list:
        matches = textsearch.finditer(self._upto(endpos), pattern, pos, flags)
        return [textsearch.found(match) for match in matches]

    def _upto(self, endpos: int | None) -> Text:
        if endpos is None or endpos >= self._blocks.size:
            return self
        stop = self._start + max(0, endpos)
        return Text(self._blocks, self._start, min(stop, self._start + len(self)), self.name)

    # -- the rest of what a str can do, on texts small enough for one string

    def isascii(self) -> bool:
        return all(piece.isascii() for _, piece in self._windows(0, None))

    def __getattr__(self, name: str):
        if name.startswith("_") or not hasattr(str, name):
            raise AttributeError(f"a Text has no attribute {name!r}")
        return getattr(self._small(f".{name}()"), name)

    def __dir__(self):
        return sorted({*object.__dir__(self), *(n for n in dir(str) if not n.startswith("_"))})

    def __str__(self) -> str:
        return self._small("str()")

    def __format__(self, spec: str) -> str:
        return format(self._small("formatting"), spec)

    def __repr__(self) -> str:
        head = self._read(0, 80)
        more = "..." if self._read(80, 81) else ""
        label = f"{self.name!r}, " if self.name else ""
        size = f"{self.nbytes:,} bytes" if self._stop is None else f"{len(self):,} characters"
        return f"Text({label}{size}, {head!r}{more})"

    def __eq__(self, other) -> bool:
        if isinstance(other, str):
            if not len(other) <= self.nbytes or len(other) != len(self):
                return False
            return all(piece == other[p : p + len(piece)] for p, piece in self._windows(0, None))
        if isinstance(other, Text):
            if self is other:
                return True
            if len(self) != len(other):
                return False
            return all(
                piece == other._read(p, p + len(piece)) for p, piece in self._windows(0, None)
            )
        return NotImplemented

    def __hash__(self) -> int:
        if self.nbytes <= STR_LIMIT:
            # equal to an equal str, as a set or a dict needs it
            return hash(self._read(0, len(self)))
        return hash((len(self), self[:1000], self[-1000:]))

    def __lt__(self, other) -> bool:
        return (
            self._small("a comparison") < str(other)
            if isinstance(other, (str, Text))
            else NotImplemented
        )

    def __le__(self, other) -> bool:
        return (
            self._small("a comparison") <= str(other)
            if isinstance(other, (str, Text))
            else NotImplemented
        )

    def __gt__(self, other) -> bool:
        return (
            self._small("a comparison") > str(other)
            if isinstance(other, (str, Text))
            else NotImplemented
        )

    def __ge__(self, other) -> bool:
        return (
            self._small("a comparison") >= str(other)
            if isinstance(other, (str, Text))
            else NotImplemented
        )

    def __add__(self, other):
        return self._small("+") + str(other) if isinstance(other, (str, Text)) else NotImplemented

    def __radd__(self, other):
        return other + self._small("+") if isinstance(other, str) else NotImplemented

    def __mul__(self, times):
        return self._small("*") * times

    __rmul__ = __mul__

    def __mod__(self, values):
        return self._small("%") % values


HINT = (
    "`context` here is a Text: a long text in a file, with the methods of str but not a str. Use a slice "
    "text[a:b] (a plain str) or str(text); patterns: re.finditer(pattern, text) or text.finditer(pattern)."
)


def hint(error: BaseException) -> str | None:
    """A sentence for the model where `error` comes of handing a Text to something that takes only a
    true str."""
    message = str(error)
    if isinstance(error, TypeError) and ("Text" in message or "'Folder'" in message):
        if "Folder" in message:
            return (
                "`context` here is a Folder: a mapping of relative path to text. Use context['path/of/file'], "
                "context.glob('**/*.py'), context.grep(pattern)."
            )
        return HINT
    return None


def load(mode: str, source: str | int, args: dict | None = None):
    """The object bound to `context`. `source`: a path or an open descriptor of the file; a path for
    a folder.

    Modes are those of `Context.payload`: text, bytes, json, mmap, folder. Raises OSError, or
    ValueError for a mode nobody knows and for bytes that are not what the mode says.
    """
    args = args or {}
    if mode == "folder":
        textsearch.install(Text)
        lazy_bytes = args.get("lazy_bytes", LAZY_BYTES)
        return Folder(
            source,
            dict(args["files"]),
            lambda path, encoding, errors: open_text(path, lazy_bytes, encoding, errors),
            args.get("skipped"),
            args.get("encodings"),
        )
    if mode == "mmap":
        textsearch.install(Text)
        return Text.open(source, name=args.get("name", ""))
    fd = source if isinstance(source, int) else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if mode == "bytes":
            return b"".join(pieces(fd))
        if mode == "text":
            return read_str(fd, args.get("encoding", "utf-8"), args.get("errors", "strict"))
        if mode == "json":
            return json.loads(b"".join(pieces(fd)))
    finally:
        if not isinstance(source, int):
            os.close(fd)
    raise ValueError(f"unknown context mode {mode!r}")


def pieces(fd: int, size: int = STEP) -> Iterator[bytes]:
    """The bytes of a file from its beginning, whatever the descriptor's position is."""
    offset = 0
    while data := os.pread(fd, size, offset):
        yield data
        offset += len(data)


def read_str(fd: int, encoding: str = "utf-8", errors: str = "strict") -> str:
    """A whole file as one str, in memory once: `+=` on a string nobody else holds grows it in
    place."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    text = ""
    for data in pieces(fd):
        text += decoder.decode(data)
    text += decoder.decode(b"", True)
    return text[1:] if text.startswith("\ufeff") and errors == "strict" else text


def open_text(
    path: str, lazy_bytes: int = LAZY_BYTES, encoding: str = "utf-8", errors: str = "strict"
):
    """A file of a folder: a str, or a Text where it is very large. Raises UnicodeError for bytes
    that are no text in this encoding (in a Text they read as U+FFFD)."""
    # never waits for a pipe's writer
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise ValueError(f"{path} is not a regular file")
    if status.st_size > lazy_bytes and encoding == "utf-8":
        return Text(Blocks(fd, owned=True), name=os.path.basename(path))
    try:
        return read_str(fd, encoding, errors).removeprefix("\ufeff")
    finally:
        os.close(fd)
