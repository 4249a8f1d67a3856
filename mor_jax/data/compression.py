"""Reading .gz, .xz and .zst as streams of bytes, where a damaged or cut-off file is an error and
never a short read."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from mor_jax.errors import DataError
from mor_jax.paths import filesystem, is_local

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
