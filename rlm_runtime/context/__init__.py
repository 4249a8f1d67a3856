"""A run's context as the host holds it: what it is, how big, how it is handed to the worker.

`Context.of` takes what a user passes: str, bytes, list, dict, chat messages, a `pathlib.Path` of a file or a folder,
or a list of Paths. Files are looked at here only by samples; the worker opens them in place.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlm_runtime.context import describe, values
from rlm_runtime.context.files import (
    LAZY_BYTES,
    MAX_FILES,
    check_text,
    compression_of,
    damage,
    files_under,
    fresh,
    opened,
    private,
    regular_size,
    status_of,
    store,
    without_mark,
)
from rlm_runtime.errors import ContextError

Kind = Literal["str", "bytes", "list", "dict", "messages", "file", "folder"]

HASH_LIMIT = 256 << 20  # larger files are not hashed
UNPACKED_LIMIT = 4 << 30  # bytes a compressed text may take unpacked, where nobody says otherwise
BYTES_PER_TOKEN = 4  # the usual rule of thumb for English; a description says "about"


@dataclass(frozen=True)
class Payload:
    """How the worker gets the context: `repl/worker/text.py` `load(mode, path or descriptor, args)` makes the object.

    `paths`: every file or folder the worker must be able to read. `memory`: bytes of address space the object and
    its loading need at most.
    """

    mode: Literal["text", "bytes", "json", "mmap", "folder"]
    path: Path | None
    bytes: int
    args: dict[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    memory: int = 0


@dataclass(frozen=True, eq=False)
class Context:
    """`value` of an in-memory context, or `path` of a file or folder, or `files` (name, path) of several files."""

    kind: Kind
    value: Any = None
    path: Path | None = None
    files: tuple[tuple[str, Path], ...] | None = None
    encoding: str = "utf-8"
    compression: str | None = None  # of a file: gzip | lzma | bz2

    # -- making one

    @classmethod
    def of(cls, x: Any) -> Context:
        """Raises ContextError for a missing, unreadable, empty or binary file and for anything that is no context."""
        if isinstance(x, Context):
            return x
        if isinstance(x, str):
            return cls._checked("str", x)
        if isinstance(x, (bytes, bytearray, memoryview)):
            return cls._checked("bytes", bytes(x))
        if isinstance(x, os.PathLike):
            return cls._of_path(Path(x))
        if isinstance(x, (list, tuple)):
            if x and all(isinstance(e, os.PathLike) for e in x):
                return cls._of_paths([Path(e) for e in x])
            return cls._checked("list", [values.plain(e) for e in x])
        if isinstance(x, Mapping):
            return cls._checked("dict", dict(x))
        if callable(getattr(x, "model_dump", None)):
            return cls._checked("dict", values.plain(x))
        raise ContextError(
            f"context: a {type(x).__name__} is not supported. Expected str, bytes, list, dict, chat messages, a "
            "pathlib.Path of a file or a folder, or a list of Paths."
        )

    @classmethod
    def file(cls, path: str | os.PathLike, encoding: str = "utf-8") -> Context:
        """A text file in a given encoding. Raises ContextError where it is not a text in that encoding."""
        try:
            encoding = codecs.lookup(encoding).name
        except LookupError:
            raise ContextError(
                f"context: unknown encoding {encoding!r}; examples: utf-8, latin-1, cp1252, utf-16."
            ) from None
        return cls._of_file(Path(path), encoding)

    @classmethod
    def folder(cls, path: str | os.PathLike) -> Context:
        """A folder. Raises ContextError where it is missing, unreadable or holds no file."""
        return cls._of_folder(Path(path))

    @classmethod
    def _checked(cls, kind: Kind, value: Any) -> Context:
        if len(value) == 0:
            raise ContextError(f"context: an empty {kind} was given; there is nothing to answer from.")
        if kind == "list" and values.are_messages(value):
            kind = "messages"
        context = cls(kind, value=value)
        if kind in ("list", "dict", "messages"):
            values.check_json(value)
            _ = context._json  # anything JSON cannot hold is an error now, not in the worker
        return context

    @classmethod
    def _of_path(cls, path: Path) -> Context:
        status_of(path)
        return cls._of_folder(path) if path.is_dir() else cls._of_file(path)

    @classmethod
    def _of_file(cls, path: Path, encoding: str = "utf-8") -> Context:
        path = path.expanduser()
        size = regular_size(path)
        if size == 0:
            raise ContextError(f"context: the file {path} is empty; there is nothing to answer from.")
        context = cls("file", path=path.absolute(), encoding=encoding, compression=compression_of(path))
        check_text(path, size, encoding, context.compression)
        return context

    @classmethod
    def _of_folder(cls, path: Path) -> Context:
        path = path.expanduser()
        if not stat.S_ISDIR(status_of(path).st_mode):
            raise ContextError(f"context: {path} is not a folder.")
        if not os.access(path, os.R_OK | os.X_OK):
            raise ContextError(f"context: the folder {path} cannot be read (permission denied).")
        context = cls("folder", path=path.resolve())
        if not context.listing:
            raise ContextError(f"context: the folder {path} holds no regular file.")
        return context

    @classmethod
    def _of_paths(cls, paths: list[Path]) -> Context:
        if len(paths) == 1:
            return cls._of_path(paths[0])
        files: dict[str, Path] = {}
        for path in paths:
            status_of(path)
            part = cls._of_path(path)
            label = path.name or str(path)
            inside = [(f"{label}/{name}", p) for name, p, _ in part.listing] if part.kind == "folder" else []
            if part.compression:
                raise ContextError(f"context: {path} is compressed; among several files only plain text is taken.")
            for name, each in inside or [(label, part.path)]:
                if name in files and files[name] != each:  # two of one name: tell them apart by their whole path
                    name = str(each)
                files[name] = each
        return cls("folder", files=tuple(files.items()))

    # -- what it is

    @cached_property
    def _json(self) -> bytes:
        try:
            return json.dumps(self.value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError) as error:
            raise ContextError(f"context: the {self.kind} is not JSON: {error}. Convert it first.") from None
        except RecursionError:
            raise ContextError(f"context: the {self.kind} is nested too deeply.") from None

    @cached_property
    def listing(self) -> list[tuple[str, Path, int]]:
        """(name, path, bytes) of the files of a folder, sorted, at most MAX_FILES."""
        if self.files is not None:
            return [(name, path, path.stat().st_size) for name, path in self.files]
        found = []
        for path in files_under(self.path):
            found.append((path.relative_to(self.path).as_posix(), path, path.stat().st_size))
            if len(found) >= MAX_FILES:
                break
        return sorted(found)

    @cached_property
    def bytes(self) -> int | None:
        """Bytes: of a str as UTF-8, of JSON values as JSON, of files on disk; None: not known before unpacking."""
        if self.kind == "str":
            return len(self.value) if self.value.isascii() else sum(len(p) for p in values.encoded(self.value))
        if self.kind == "bytes":
            return len(self.value)
        if self.kind == "file":
            return None if self.compression else self.path.stat().st_size
        if self.kind == "folder":
            return sum(size for _, _, size in self.listing)
        return len(self._json)

    @cached_property
    def chars(self) -> int | None:
        """Characters of a text, where known without reading a large file."""
        if self.kind == "str":
            return len(self.value)
        if self.kind in ("list", "dict", "messages"):
            return len(self._json.decode("utf-8", "surrogatepass"))
        if self.kind == "file" and not self.compression and self.bytes <= LAZY_BYTES:
            return len(self._small_text)
        return None

    @property
    def tokens(self) -> int | None:
        """A rough estimate, for the root and for budgets; None where the size is not known."""
        return None if self.bytes is None else -(-self.bytes // BYTES_PER_TOKEN)

    @cached_property
    def _small_text(self) -> str:
        return without_mark(self.path.read_bytes().decode(self.encoding, "replace"))

    # -- handing it over

    def payload(
        self,
        folder: Path,
        lazy_bytes: int = LAZY_BYTES,
        *,
        unpacked: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Payload:
        """Write what has to be written into the run's private folder, once, and say how to load it.

        A plain file or folder is not copied; a compressed one is unpacked to at most `unpacked` bytes. Once `stop()`
        is true, writing ends. Raises ContextError where a file has become unreadable, no longer holds text, or is
        larger, and where it was stopped.
        """
        if self.kind == "folder":
            args: dict[str, Any] = {"lazy_bytes": lazy_bytes}
            if self.files is not None:
                args["files"] = [[name, str(path)] for name, path in self.files]
            paths = (self.path,) if self.files is None else tuple(path for _, path in self.files)
            return Payload("folder", self.path, self.bytes, args, paths, memory=64 << 20)
        if self.kind == "file":
            limit = UNPACKED_LIMIT if unpacked is None else unpacked
            return self._file_payload(folder, lazy_bytes, limit, stop)
        target = fresh(folder, "context")
        with open(target, "xb", opener=private) as out:
            for piece in self._pieces():
                out.write(piece)
        size = target.stat().st_size
        if self.kind == "str":
            wide = 1 if self.value.isascii() else 4
            return Payload("text", target, size, {"errors": "surrogatepass"}, (target,), 2 * wide * len(self.value))
        if self.kind == "bytes":
            return Payload("bytes", target, size, {}, (target,), 2 * size)
        return Payload("json", target, size, {}, (target,), 2 * size + 40 * values.nodes(self._json))

    def _file_payload(self, folder: Path, lazy_bytes: int, limit: int, stop: Callable[[], bool]) -> Payload:
        size, path, args = regular_size(self.path), self.path, {"name": self.path.name}
        if self.compression or (self.encoding != "utf-8" and size > lazy_bytes):
            path = fresh(folder, "context")  # the lazy text reads plain UTF-8 only
            size = self._unpack(path, limit, stop)
        elif self.encoding != "utf-8":
            args["encoding"] = self.encoding
        if size > lazy_bytes:
            return Payload("mmap", path, size, args, (path,), memory=64 << 20)
        return Payload("text", path, size, args, (path,), memory=8 * size)

    def _unpack(self, target: Path, limit: int, stop: Callable[[], bool]) -> int:
        """The file as plain UTF-8; returns its size."""
        decoder = codecs.getincrementaldecoder(self.encoding)("strict")
        written = 0
        try:
            with opened(self.path, self.compression) as source, open(target, "xb", opener=private) as out:
                while piece := source.read(values.PIECE):
                    text = decoder.decode(piece)
                    written += out.write((without_mark(text) if written == 0 else text).encode("utf-8"))
                    if written > limit:
                        raise ContextError(
                            f"context: {self.path} unpacks to more than {limit:,} bytes. Allow more with "
                            "Limits(unpacked=...), or unpack it and give the plain file, which is not copied."
                        )
                    if stop():
                        raise ContextError(f"context: unpacking {self.path} was stopped.")
                out.write(decoder.decode(b"", True).encode("utf-8"))
        except (UnicodeDecodeError, EOFError, OSError, *damage()) as error:
            target.unlink(missing_ok=True)
            raise ContextError(f"context: {self.path} cannot be read as {self.encoding} text: {error}.") from None
        except ContextError:
            target.unlink(missing_ok=True)
            raise
        if written == 0:
            target.unlink(missing_ok=True)
            raise ContextError(f"context: {self.path} unpacks to an empty text.")
        return target.stat().st_size

    def _pieces(self) -> Iterator[bytes]:
        if self.kind == "str":
            yield from values.encoded(self.value)
        else:
            yield self.value if self.kind == "bytes" else self._json

    @cached_property
    def sha256(self) -> str | None:
        """Of the bytes; None for folders, several files and files above HASH_LIMIT."""
        digest = hashlib.sha256()
        if self.kind == "folder" or (self.kind == "file" and self.path.stat().st_size > HASH_LIMIT):
            return None
        if self.kind == "file":
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        for piece in self._pieces():
            digest.update(piece)
        return digest.hexdigest()

    def record(self, blobs: Path | None = None, name: str = "context") -> dict[str, Any]:
        """The fields of the trajectory's `context` event. An in-memory context is stored once under its hash in
        `blobs`; files and folders are named, not copied."""
        in_memory = self.kind not in ("file", "folder")
        blob = None
        if blobs is not None and in_memory:
            blob = self.sha256
            store(blobs, blob, self._pieces())
        return {
            "name": name,
            "kind": self.kind,
            "chars": self.chars,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "blob": blob,
            "path": None if in_memory or self.path is None else str(self.path),
            "preview": self.preview(600),
        }

    @classmethod
    def from_record(cls, fields: Mapping[str, Any], blobs: Path | None) -> Context:
        """The context of a recorded run. Raises ContextError where its blob or file is gone or has changed."""
        kind, blob, path = fields["kind"], fields.get("blob"), fields.get("path")
        if blob is None and path is not None:
            context = cls.of(Path(path))
        elif blob is not None and blobs is not None and (Path(blobs) / Path(blob).name).is_file():
            data = (Path(blobs) / Path(blob).name).read_bytes()
            if kind == "str":
                context = cls.of(data.decode("utf-8", "surrogatepass"))
            else:
                context = cls.of(data if kind == "bytes" else json.loads(data))
        else:
            raise ContextError("context: the recorded run kept neither the context nor its path.")
        wanted = fields.get("sha256")
        if wanted is not None and context.sha256 != wanted:
            raise ContextError(f"context: {path or blob} is not what the recorded run read (its hash differs).")
        return context

    # -- what the root sees

    def describe(self, limit: int = 1400, name: str = "context") -> str:
        """Type, size, structure and a preview of at most about `limit` characters; never the whole of a long text.
        `name`: the variable it is bound to."""
        preview = self.preview(limit) if limit > 0 else ""
        return "\n".join([*describe.facts(self, name), *([preview] if preview else [])])

    def preview(self, limit: int = 1400) -> str:
        """The beginning and the end, quoted as Python literals: nothing in it can pass for the runtime's own words."""
        return describe.preview(self, limit)
