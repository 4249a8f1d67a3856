"""Documents, and the content of the files they come from: opened, decompressed, hashed.

A damaged or cut-off file is an error and never a short read. Digests of files are remembered, so
that a large corpus is not read again at every start.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from mor_jax.errors import DataError, UserError
from mor_jax.paths import filesystem, is_local, reason

Digest = Callable[[str], str]  # path of a local file -> hex digest of its content


class Document(NamedTuple):
    """One text. `id` is stable under moving the corpus to another directory; the held-out split
    hangs on it."""

    id: str
    text: str


class TextSource(Protocol):
    """A corpus that can be read from the start any number of times, in the same order each time."""

    label: str  # for messages: "files corpus/*.jsonl"

    def documents(self) -> Iterator[Document]:
        """All documents, streamed. Raises DataError naming the file and place of the first one that
        cannot be read."""

    def fingerprint(self) -> str:
        """Hex digest that changes when any document or id does."""


def valid_text(text: str) -> str:
    """`text` with lone surrogates (JSON can spell them, UTF-8 cannot) replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".gz", ".xz", ".zst")

# What reading any of these can raise when the file is missing, forbidden, damaged or cut off.
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)


def open_bytes(path: str, compression: str) -> BinaryIO | io.BufferedIOBase:
    """`path` opened for reading, decompressed. `compression`: one of SUFFIXES, or "" for none."""
    if compression == ".zst":
        return io.BufferedReader(_ZstdReader(path), 1 << 17)
    if compression not in (".gz", ".xz"):
        return open_file(path)
    source = path if is_local(path) else open_file(path)
    return gzip.open(source, "rb") if compression == ".gz" else lzma.open(source, "rb")


def open_file(path: str) -> BinaryIO:
    """`path`, of this machine or an object store, opened for reading as it is."""
    return open(path, "rb") if is_local(path) else filesystem(path).open(path, "rb")


class _ZstdReader(io.RawIOBase):
    """All frames of a .zst file, one after another.

    `zstandard.ZstdDecompressor.stream_reader` ends without an error when its input is cut off; this
    one raises EOFError then.
    """

    def __init__(self, path: str):
        self._zstandard = _import_zstandard(path)
        self._file = open_file(path)
        self._frame: Any = None  # decompressor of the frame being read
        self._ready = b""  # decompressed, not yet handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._ready:
            chunk = self._frame.unused_data if self._frame and self._frame.eof else b""
            chunk = chunk or self._file.read(1 << 17)
            if not chunk:
                if self._frame and not self._frame.eof:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(chunk)
            except self._zstandard.ZstdError as e:
                raise OSError(str(e)) from e
        room = memoryview(buffer)
        n = min(len(room), len(self._ready))
        room[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _import_zstandard(path: str) -> ModuleType:
    try:
        import zstandard
    except ImportError as e:
        raise DataError(
            f"{path}: reading .zst needs the zstandard package: pip install zstandard (it is in the extra data)"
        ) from e
    return zstandard


SMALL = 1 << 20  # bytes; hashing less than this costs about as much as looking it up
# a file changed more recently than this may change again within one clock tick
SETTLED_NS = 2_000_000_000


def digest_of(*parts: str) -> str:
    """128-bit hex blake2b over `parts`, each closed by a separator that cannot occur in UTF-8."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(part.encode("utf-8", "surrogateescape") + b"\xff")
    return h.hexdigest()


def hash_file(path: str) -> str:
    """128-bit hex blake2b of a file's bytes. Raises DataError naming a file that cannot be read."""
    h = hashlib.blake2b(digest_size=16)
    try:
        with open_file(path) as f:
            while chunk := f.read(1 << 20):
                h.update(chunk)
    except UserError:
        raise
    except Exception as e:  # clients of object stores have their own kinds
        raise DataError(
            f"{path}: cannot be read ({reason(e)}). Check that it exists and its permissions."
        ) from e
    return h.hexdigest()


class HashMemo:
    """`hash_file`, remembering the digest of large files by (path, size, mtime, inode) in one JSON
    file.

    The memo is an optimisation only: if it is unreadable or unwritable the files are hashed again.
    A file that was changed in the last two seconds is never remembered, since a further change
    could leave its times equal.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, list[Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_text())
            self._known = known if isinstance(known, dict) else {}

    def __call__(self, path: str) -> str:
        key = os.path.abspath(path) if is_local(path) else path
        before = _state(key)
        if before is None or before[0] < SMALL:
            return hash_file(path)
        known = self._known.get(key)
        if isinstance(known, list) and known[:-1] == before:
            return known[-1]
        digest = hash_file(path)
        if _state(key) == before and _settled(before[1]):
            self._known[key] = [*before, digest]
            self._save()
        return digest

    def _save(self) -> None:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
            draft.write_text(json.dumps(self._known))
            os.replace(draft, self._path)


def _settled(version: int | str) -> bool:
    """Whether a version tells any two contents apart: a time of change does after a while, an
    object's tag always."""
    return isinstance(version, str) or time.time_ns() - version > SETTLED_NS


def _state(path: str) -> list[Any] | None:
    """What changes when the content does: size, time of change or tag, and inode. None: it cannot
    be seen."""
    if not is_local(path):
        with contextlib.suppress(Exception):
            info = filesystem(path).info(path)
            tags = [
                info[name] for name in ("ETag", "etag", "generation", "md5Hash") if info.get(name)
            ]
            return [info["size"], str(tags[0]), 0] if tags else None
        return None
    try:
        s = os.stat(path)
    except OSError:
        return None  # hash_file says why
    return [s.st_size, s.st_mtime_ns, s.st_ino]
