"""Looking at the files of a context from the host: by samples, never whole where they are large."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rlm_runtime.errors import ContextError

LAZY_BYTES = 8 << 20  # larger files are read lazily in the worker; smaller ones become a true str there
SAMPLE = 64 << 10  # bytes looked at, at a place
MAX_FILES = 200_000  # of a folder
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


def status_of(path: Path) -> os.stat_result:
    try:
        return os.stat(path.expanduser())
    except FileNotFoundError:
        hint = " It is a link to nothing." if path.is_symlink() else ""
        raise ContextError(f"context: there is no file or folder {path} (looked from {Path.cwd()}).{hint}") from None
    except (OSError, ValueError) as error:
        raise ContextError(f"context: {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


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
    return next((how for magic, how in COMPRESSED.items() if head.startswith(magic)), None)


def opened(path: Path, compression: str | None) -> IO[bytes]:
    if compression is None:
        return open(path, "rb")
    import bz2
    import gzip
    import lzma

    return {"gzip": gzip.open, "lzma": lzma.open, "bz2": bz2.open}[compression](path, "rb")


def damage() -> tuple[type[Exception], ...]:
    import lzma
    import zlib

    return lzma.LZMAError, zlib.error


def check_text(path: Path, size: int, encoding: str, compression: str | None) -> None:
    """Small files are decoded whole; of large ones both ends and eight places between are looked at."""
    wide = encoding.replace("-", "_").startswith(("utf_16", "utf_32"))
    try:
        with opened(path, compression) as file:
            if compression:
                samples = [(0, file.read(SAMPLE), False)]
                if not samples[0][1]:
                    raise ContextError(f"context: {path} unpacks to an empty text.")
            elif size <= LAZY_BYTES or wide:
                samples = [(0, file.read(LAZY_BYTES), size <= LAZY_BYTES)]
            else:
                samples = []
                for i in range(10):
                    at = (size - SAMPLE) * i // 9
                    file.seek(at)
                    samples.append((at, file.read(SAMPLE), False))
    except (OSError, EOFError, *damage()) as error:
        raise ContextError(f"context: {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    for at, data, whole in samples:
        if not wide and b"\0" in data:
            offset = at + data.index(b"\0")
            raise ContextError(_binary(path, samples[0][1], f"a NUL byte at offset {offset:,}"))
        bad = _undecodable(data, encoding, first=at == 0, whole=whole)
        if bad is not None:
            raise ContextError(
                _binary(path, samples[0][1], f"byte 0x{data[bad]:02x} at offset {at + bad:,} is not {encoding}")
            )


def _undecodable(data: bytes, encoding: str, first: bool, whole: bool) -> int | None:
    """Offset of the first byte that is no text, a character cut by the borders of a sample aside."""
    skip = 0
    if not first and encoding == "utf-8":
        while skip < min(3, len(data)) and data[skip] & 0xC0 == 0x80:
            skip += 1
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    try:
        decoder.decode(data[skip:], whole)
    except UnicodeDecodeError as error:
        return min(skip + error.start, len(data) - 1)
    return None


def _binary(path: Path, head: bytes, found: str) -> str:
    known = next((what for magic, what in MAGIC.items() if head.startswith(magic)), None)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return (
            f"context: {path} is not UTF-8: {found}; it looks like UTF-16. "
            f"Use Context.file({str(path)!r}, encoding='utf-16')."
        )
    what = f"is {known}, not text" if known else "is not UTF-8 text"
    return (
        f"context: {path} {what}: {found}. Extract its text first, name its encoding with "
        f"Context.file(path, encoding='latin-1'), or pass the bytes themselves with Context.of(path.read_bytes())."
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
    if encoding in ("utf-16", "utf-32"):  # no mark at the end of a file: as the machine and most writers have it
        encoding += "-le"
    return data.decode(encoding, "replace")


def without_mark(text: str) -> str:
    return text.removeprefix("\ufeff")


def files_under(root: Path) -> Iterator[Path]:
    """As `repl/worker/folder.py` lists them: regular files, links only where they stay inside."""
    for here, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in HIDDEN and not os.path.islink(os.path.join(here, f)))
        for name in sorted(files):
            path = Path(here, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                continue
            if path.is_file():
                yield path


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
