"""Looking at the files of a context from the host: by samples, never whole where they are large."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from rlm_runtime.errors import ContextError

# larger files are read lazily in the worker; smaller ones become a true str there
LAZY_BYTES = 256 << 20
SAMPLE = 64 << 10  # bytes looked at, at a place
MAX_FILES = 200_000  # of a folder
PIECE = 1 << 20  # bytes decoded at a time
HIDDEN = {".git", ".hg", ".svn"}  # a version control's own files are not part of a folder's context

MAGIC = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"PK\x03\x04": "a ZIP archive (also .docx, .xlsx, .pptx, .jar)",
    b"SQLite format 3\0": "an SQLite database",
    b"\x7fELF": "an ELF program",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "Zstandard-compressed data",
    b"\x93NUMPY": "a NumPy array",
    b"OggS": "an Ogg stream",
    b"ID3": "an MP3 file",
    b"RIFF": "a RIFF file (WAV, AVI, WebP)",
}
COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "lzma", b"BZh": "bz2"}
MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # how UTF-16 and UTF-32 texts begin


def status_of(path: Path) -> os.stat_result:
    try:
        return os.stat(path.expanduser())
    except FileNotFoundError:
        hint = " It is a link to nothing." if path.is_symlink() else ""
        raise ContextError(
            f"context: there is no file or folder {path} (looked from {Path.cwd()}).{hint}"
        ) from None
    except (OSError, ValueError) as error:
        raise ContextError(
            f"context: {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None


def regular_size(path: Path) -> int:
    """Size of a readable regular file."""
    status = status_of(path)
    if stat.S_ISDIR(status.st_mode):
        raise ContextError(f"context: {path} is a folder, a file was expected.")
    if not stat.S_ISREG(status.st_mode):
        raise ContextError(f"context: {path} is not a regular file (a pipe, socket or device).")
    if not os.access(path, os.R_OK):
        raise ContextError(f"context: {path} cannot be read (permission denied).")
    return status.st_size


def compression_of(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ContextError(f"context: {path} cannot be read: {error.strerror}.") from None
    return packed(head)


def packed(head: bytes) -> str | None:
    """How a file that begins like this is compressed."""
    return next((how for magic, how in COMPRESSED.items() if head.startswith(magic)), None)


def known(head: bytes) -> str | None:
    """What a binary file that begins like this is."""
    return next((what for magic, what in MAGIC.items() if head.startswith(magic)), None)


def opened(path: Path, compression: str | None) -> IO[bytes]:
    if compression is None:
        return open(path, "rb")
    import bz2
    import gzip
    import lzma

    if compression == "gzip":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return cast(IO[bytes], lzma.open(path, "rb") if compression == "lzma" else bz2.open(path, "rb"))


def damage(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading a file raises that is unreadable or damaged, and `more`."""
    import lzma
    import zlib

    return OSError, EOFError, lzma.LZMAError, zlib.error, *more


# Encodings a sample can tell apart; cp1252 stands for its relatives, whose texts differ in a few
# letters.
GUESSABLE = [
    "utf_8",
    "cp1252",
    "cp1251",
    "koi8_r",
    "cp1253",
    "cp1255",
    "cp1256",
    "cp932",
    "euc_jp",
    "gb18030",
    "big5",
    "cp949",
]


@dataclass(frozen=True)
class FilePiece:
    """Bytes of a file from offset `at`; `last`: they end where the file does."""

    at: int
    data: bytes
    last: bool


@dataclass(frozen=True)
class Measure:
    """Of a text that was decoded whole."""

    chars: int
    lines: int


def check_text(path: Path, size: int, encoding: str, compression: str | None) -> Measure | None:
    """Raises ContextError where the file is no text in this encoding. Files up to LAZY_BYTES are
    decoded whole, piece by piece, and measured; of larger ones both ends and eight places between
    are looked at."""
    try:
        with opened(path, compression) as file:
            if compression:
                head = file.read(SAMPLE)
                if not head:
                    raise ContextError(f"context: {path} unpacks to an empty text.")
                _complain(path, head, not_text([FilePiece(0, head, False)], encoding), encoding)
                return None
            if size <= LAZY_BYTES:
                return _measure(path, file, encoding)
    except damage() as error:
        raise ContextError(
            f"context: {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None
    pieces = samples(path, size, whole=0)
    _complain(path, pieces[0].data, not_text(pieces, encoding), encoding)
    return None


def _measure(path: Path, file: IO[bytes], encoding: str) -> Measure:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    at = chars = lines = 0
    head, last = b"", False
    while not last:
        data = file.read(PIECE)
        head, last = head or data, len(data) < PIECE
        kept = len(decoder.getstate()[0])  # bytes of a character that the piece before has cut
        try:
            text = decoder.decode(data, last)
        except UnicodeDecodeError as error:
            bad = at - kept + error.start
            _complain(path, head, _not_of(error.object[error.start], bad, encoding), encoding)
            raise
        if "\0" in text:
            nul = data.find(b"\0") if not _wide(encoding) else -1
            where = f" at offset {at + nul:,}" if nul >= 0 else ""
            _complain(path, head, f"a NUL byte{where}", encoding)
        chars += len(text)
        lines += text.count("\n")
        at += len(data)
    return Measure(chars - bool(_starts_with_mark(head, encoding)), lines + 1)


def _starts_with_mark(head: bytes, encoding: str) -> bool:
    return decoded(head[:4], encoding).startswith("\ufeff")


def samples(path: Path, size: int, whole: int) -> list[FilePiece]:
    """All of a file of at most `whole` bytes, else ten samples. Raises OSError."""
    with open(path, "rb") as file:
        if size <= max(whole, SAMPLE):
            return [FilePiece(0, file.read(size + 1), True)]
        pieces = []
        for at in [(size - SAMPLE) * i // 9 for i in range(10)]:
            file.seek(at)
            pieces.append(FilePiece(at, file.read(SAMPLE), at + SAMPLE >= size))
        return pieces


def not_text(pieces: list[FilePiece], encoding: str) -> str | None:
    """Where the pieces of a file are no text in this encoding: what was found, else None."""
    for piece in pieces:
        # in the middle, nothing says which byte of a character comes first
        if _wide(encoding) and piece.at:
            continue
        if not _wide(encoding) and b"\0" in piece.data:
            return f"a NUL byte at offset {piece.at + piece.data.index(0):,}"
        bad = _undecodable(piece, encoding)
        if bad is not None:
            return _not_of(piece.data[bad], piece.at + bad, encoding)
    return None


def _not_of(byte: int, offset: int, encoding: str) -> str:
    return f"byte 0x{byte:02x} at offset {offset:,} is not {encoding}"


def _wide(encoding: str) -> bool:
    return encoding.replace("-", "_").startswith(("utf_16", "utf_32"))


def _undecodable(piece: FilePiece, encoding: str) -> int | None:
    """Offset of the first byte that is no text, a character cut by the borders of a sample
    aside."""
    data, skip = piece.data, 0
    if piece.at and encoding == "utf-8":
        while skip < min(3, len(data)) and data[skip] & 0xC0 == 0x80:
            skip += 1
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    try:
        decoder.decode(data[skip:], piece.last)
    except UnicodeDecodeError as error:
        return min(skip + error.start, len(data) - 1)
    except UnicodeError:
        return 0
    return None


def looks_like(head: bytes) -> str | None:
    """A guess at the encoding, to be named and never to be followed."""
    if head.startswith(MARKS):
        return "utf-32" if head[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE) else "utf-16"
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    if len(head) < 40:  # too little to tell
        return None
    best = from_bytes(head[: SAMPLE // 4], cp_isolation=GUESSABLE).best()
    return (
        None
        if best is None or best.encoding in ("ascii", "utf_8")
        else best.encoding.replace("_", "-")
    )


def _complain(path: Path, head: bytes, found: str | None, encoding: str) -> None:
    if found is None:
        return
    what = f"is {kind}, not text" if (kind := known(head)) else f"is not {encoding.upper()} text"
    hint = "" if kind or (b"\0" in head and not head.startswith(MARKS)) else looks_like(head)
    guess = f" It may be {hint}: a guess, so nothing is decoded by it." if hint else ""
    raise ContextError(
        f"context: {path} {what}: {found}.{guess} Name its encoding with --encoding {hint or 'latin-1'} or "
        f"Context.file(path, encoding={hint or 'latin-1'!r}), extract its text first, or pass the bytes themselves with "
        "Context.of(path.read_bytes())."
    )


def decoded(data: bytes, encoding: str) -> str:
    """The characters of a piece whose end may cut one."""
    return codecs.getincrementaldecoder(encoding)("replace").decode(data)


def last_text(file: IO[bytes], size: int, count: int, encoding: str) -> str:
    file.seek(max(0, size - count - count % 4))
    data = file.read()
    if encoding == "utf-8":
        skip = 0
        while skip < min(3, len(data)) and data[skip] & 0xC0 == 0x80:
            skip += 1
        data = data[skip:]
    # no mark at the end of a file: as the machine and most writers have it
    if encoding in ("utf-16", "utf-32"):
        encoding += "-le"
    return data.decode(encoding, "replace")


def without_mark(text: str) -> str:
    return text.removeprefix("\ufeff")


# -- writing files


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def fresh(folder: Path, name: str) -> Path:
    """A name nobody uses in this folder yet (a session loads several contexts)."""
    number = 0
    while (path := Path(folder) / (name if number == 0 else f"{name}_{number}")).exists():
        number += 1
    return path


def store(blobs: Path, name: str, pieces: Iterator[bytes]) -> None:
    target = Path(blobs) / name
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{name}.{os.getpid()}.{os.urandom(4).hex()}")
    with open(partial, "xb", opener=private) as out:
        for piece in pieces:
            out.write(piece)
    os.replace(partial, target)
