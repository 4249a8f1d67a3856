"""A run's context as the host holds it: what it is, how big, how it is handed to the worker.

`Context.of` takes what a user passes: str, bytes, list, dict, chat messages, a `pathlib.Path` of a
file or a folder, a list of Paths, or a table (a DataFrame). Texts that the worker takes as one str
are decoded here once, to see that they are texts; of larger files only samples are looked at. The
worker opens files in place.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rlm_runtime.context import describe, extract, values
from rlm_runtime.context.files import (
    LAZY_BYTES,
    SAMPLE,
    Measure,
    check_text,
    compression_of,
    damage,
    fresh,
    opened,
    private,
    regular_size,
    status_of,
    store,
    without_mark,
)
from rlm_runtime.context.survey import UNREADABLE, Reading, Survey, find, survey
from rlm_runtime.errors import ContextError, UsageError

Kind = Literal["str", "bytes", "list", "dict", "messages", "file", "folder"]

Raw = bytes  # the built-in; in the class below `bytes` is a property

HASH_LIMIT = 256 << 20  # larger files are not hashed, and a copy of a piped text is not kept
UNPACKED_LIMIT = 4 << 30  # bytes a compressed text may take unpacked, where nobody says otherwise
BYTES_PER_TOKEN = 4  # the usual rule of thumb for English; a description says "about"


@dataclass(frozen=True)
class Payload:
    """How the worker gets the context: `repl/worker/text.py` `load(mode, path or descriptor, args)`
    makes the object.

    `paths`: every file or folder the worker must be able to read. `memory`: bytes of address space
    the object and its loading need at most.
    """

    mode: Literal["text", "bytes", "json", "mmap", "folder"]
    path: Path | None
    bytes: int
    args: dict[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    memory: int = 0


@dataclass(frozen=True, eq=False)
class Context:
    """`value` of an in-memory context, or `path` of a file or folder, or `files` (name, path) of
    several files.

    `about`: a sentence for the root on where an extracted text comes from. `keep`: the file will be
    gone after the run, so that a trajectory keeps its text.
    """

    kind: Kind
    value: Any = None
    path: Path | None = None
    files: tuple[tuple[str, Path], ...] | None = None
    encoding: str = "utf-8"
    compression: str | None = None  # of a file: gzip | lzma | bz2
    reading: Reading = Reading()  # noqa: RUF009 - frozen; of a folder: which files, and how
    about: str = ""
    measure: Measure | None = None  # of a file that was decoded whole
    keep: bool = False

    # -- making one

    @classmethod
    def of(
        cls,
        x: Any,
        *,
        encoding: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        gitignore: bool = True,
    ) -> Context:
        """A context of anything that can be one.

        The options are for Paths. `encoding`: of a file; in a folder, of the files that are not
        UTF-8, which are left out without it. `include`, `exclude`: patterns as in a `.gitignore`
        for what is found in folders, whose own `.gitignore` files hold too unless
        `gitignore=False`.

        Raises ContextError for a missing, unreadable, empty or binary file and for anything that is
        no context, and UsageError for a pattern that is none.
        """
        reading = Reading(
            encoding and _codec(encoding), _patterns(include), _patterns(exclude), gitignore
        )
        if isinstance(x, os.PathLike):
            return cls._of_paths([Path(x)], reading)
        if isinstance(x, (list, tuple)) and x and all(isinstance(e, os.PathLike) for e in x):
            return cls._of_paths([Path(e) for e in x], reading)
        if reading != Reading():
            raise UsageError(
                "context: encoding, include, exclude and gitignore say how the files of a Path are read."
            )
        if isinstance(x, Context):
            return x
        if isinstance(x, str):
            return cls._checked("str", x)
        if isinstance(x, (bytes, bytearray, memoryview)):
            return cls._checked("bytes", bytes(x))
        if isinstance(x, (list, tuple)):
            return cls._checked("list", [values.plain(e) for e in x])
        if isinstance(x, Mapping):
            return cls._checked("dict", dict(x))
        if callable(getattr(x, "model_dump", None)):
            return cls._checked("dict", values.plain(x))
        if values.is_table(x):
            text, about = values.table(x)
            return cls("str", value=text, about=about)
        raise ContextError(
            f"context: a {type(x).__name__} is not supported. Expected str, bytes, list, dict, chat messages, a "
            "pathlib.Path of a file or a folder, a list of Paths, or a DataFrame."
        )

    @classmethod
    def file(cls, path: str | os.PathLike[str], encoding: str = "utf-8") -> Context:
        """A text file in a given encoding. Raises ContextError where it is not a text in that
        encoding."""
        return cls._of_file(Path(path), _codec(encoding))

    @classmethod
    def folder(
        cls,
        path: str | os.PathLike[str],
        *,
        encoding: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        gitignore: bool = True,
    ) -> Context:
        """A folder; the options are those of `of`. Raises ContextError where it is missing,
        unreadable or holds no text."""
        reading = Reading(
            encoding and _codec(encoding), _patterns(include), _patterns(exclude), gitignore
        )
        return cls._of_folder(Path(path), reading)

    @classmethod
    def several(cls, files: Mapping[str, Path], *, encoding: str | None = None) -> Context:
        """Files under names of their own. Raises ContextError where none of them is a text."""
        reading = Reading(encoding and _codec(encoding))
        return cls("folder", files=tuple(files.items()), reading=reading)._with_texts(
            "the files hold"
        )

    @classmethod
    def _checked(cls, kind: Kind, value: Any) -> Context:
        if len(value) == 0:
            raise ContextError(
                f"context: an empty {kind} was given; there is nothing to answer from."
            )
        if kind == "list" and values.are_messages(value):
            kind = "messages"
        context = cls(kind, value=value)
        if kind in ("list", "dict", "messages"):
            values.check_json(value)
            _ = context._json  # anything JSON cannot hold is an error now, not in the worker
        return context

    @classmethod
    def _of_path(cls, path: Path, reading: Reading) -> Context:
        status_of(path)
        if path.expanduser().is_dir():
            return cls._of_folder(path, reading)
        return cls._of_file(path, reading.encoding or "utf-8")

    @classmethod
    def _of_file(cls, path: Path, encoding: str = "utf-8") -> Context:
        path = path.expanduser()
        size = regular_size(path)
        if size == 0:
            raise ContextError(
                f"context: the file {path} is empty; there is nothing to answer from."
            )
        if (kind := _document(path)) is not None:
            of = extract.KINDS[kind]
            about = f"the text of {of.what}, {describe.quoted(path.name, 200)}; {of.form}"
            return cls("str", value=extract.text_of(path, kind), about=about)
        compression = compression_of(path)
        measure = check_text(path, size, encoding, compression)
        return cls(
            "file",
            path=path.absolute(),
            encoding=encoding,
            compression=compression,
            measure=measure,
        )

    @classmethod
    def _of_folder(cls, path: Path, reading: Reading) -> Context:
        path = path.expanduser()
        if not stat.S_ISDIR(status_of(path).st_mode):
            raise ContextError(f"context: {path} is not a folder.")
        if not os.access(path, os.R_OK | os.X_OK):
            raise ContextError(f"context: the folder {path} cannot be read (permission denied).")
        return cls("folder", path=path.resolve(), reading=reading)._with_texts(
            f"the folder {path} holds"
        )

    def _with_texts(self, what: str) -> Context:
        """This folder, unless there is nothing to read in it."""
        found = self.survey
        if not found.entries:
            left = " ".join(found.left_out())
            what = f"{what} no text" if left else f"{what} no regular file"
            raise ContextError(f"context: {what}. {left}".rstrip())
        return self

    @classmethod
    def _of_paths(cls, paths: list[Path], reading: Reading) -> Context:
        for path in paths:
            status_of(path)
        if (reading.include or reading.exclude) and not any(
            path.expanduser().is_dir() for path in paths
        ):
            raise UsageError(
                "context: include and exclude choose among the files of a folder; no folder was given."
            )
        if len(paths) == 1:
            return cls._of_path(paths[0], reading)
        files: dict[str, Path] = {}
        found = Survey()
        named: set[Path] = set()  # documents: errors, where they cannot be read
        for path in paths:
            label = path.name or str(path)
            if path.expanduser().is_dir():
                root = path.expanduser().resolve()
                inside = [(f"{label}/{name}", each) for name, each in find(root, reading, found)]
                if not inside:
                    cls._of_folder(path, reading)  # says why
            else:
                whole = path.expanduser().absolute()
                if _document(whole) is not None:
                    named.add(whole)
                else:
                    cls._one_of_several(path, reading)
                inside = [(label, whole)]
            for name, each in inside:
                # two of one name: tell them apart by their whole path
                if name in files and files[name] != each:
                    name = str(each)
                files[name] = each
        context = cls("folder", files=tuple(files.items()), reading=reading)
        context.survey.ignored.update(found.ignored)
        context.survey.truncated |= found.truncated
        for skipped in context.survey.skipped:
            if skipped.path in named:
                raise ContextError(f"context: {skipped.why}")
        return context._with_texts("the files hold")

    @classmethod
    def _one_of_several(cls, path: Path, reading: Reading) -> None:
        """A file that was named must be a text: UTF-8, or in the encoding that is given."""
        try:
            part = cls._of_file(path)
        except ContextError:
            if reading.encoding is None:
                raise
            part = cls._of_file(path, reading.encoding)
        if part.compression:
            raise ContextError(
                f"context: {path} is compressed; among several files only plain text is taken."
            )

    # -- what it is

    @property
    def location(self) -> Path:
        """The path of a file or a folder."""
        assert self.path is not None, f"a context of kind {self.kind} has no path"
        return self.path

    @cached_property
    def _json(self) -> bytes:
        try:
            return json.dumps(self.value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except (TypeError, ValueError) as error:
            raise ContextError(
                f"context: the {self.kind} is not JSON: {error}. Convert it first."
            ) from None
        except RecursionError:
            raise ContextError(f"context: the {self.kind} is nested too deeply.") from None

    @cached_property
    def survey(self) -> Survey:
        """Of a folder: its texts, and what else was found."""
        found = Survey()
        return survey(
            self.files if self.files is not None else find(self.location, self.reading, found),
            self.reading,
            found,
        )

    @property
    def listing(self) -> list[tuple[str, Path, int]]:
        """(name, path, bytes) of the texts of a folder, sorted, of at most MAX_FILES files."""
        return [(entry.name, entry.path, entry.bytes) for entry in self.survey.entries]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know: which files were left out or converted."""
        return tuple(self.survey.left_out()) if self.kind == "folder" else ()

    @cached_property
    def bytes(self) -> int | None:
        """Bytes: of a str as UTF-8, of JSON values as JSON, of files on disk; None: not known
        before unpacking."""
        if self.kind == "str":
            return (
                len(self.value)
                if self.value.isascii()
                else sum(len(p) for p in values.encoded(self.value))
            )
        if self.kind == "bytes":
            return len(self.value)
        if self.kind == "file":
            return None if self.compression else self.location.stat().st_size
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
        return self.measure.chars if self.measure is not None else None

    @property
    def tokens(self) -> int | None:
        """A rough estimate, for the root and for budgets; None where the size is not known."""
        return None if self.bytes is None else -(-self.bytes // BYTES_PER_TOKEN)

    @cached_property
    def _small_text(self) -> str:
        """Of a file of at most SAMPLE bytes."""
        with open(self.location, "rb") as file:
            return without_mark(file.read(SAMPLE).decode(self.encoding, "replace"))

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

        A plain file or folder is not copied; a compressed one is unpacked to at most `unpacked`
        bytes. Once `stop()` is true, writing ends. Raises ContextError where a file has become
        unreadable, no longer holds text, or is larger, and where it was stopped.
        """
        if self.kind == "folder":
            return self._folder_payload(folder, lazy_bytes)
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
            return Payload(
                "text",
                target,
                size,
                {"errors": "surrogatepass"},
                (target,),
                2 * wide * len(self.value),
            )
        if self.kind == "bytes":
            return Payload("bytes", target, size, {}, (target,), 2 * size)
        return Payload(
            "json", target, size, {}, (target,), 2 * size + 40 * values.nodes(self._json)
        )

    def _folder_payload(self, folder: Path, lazy_bytes: int) -> Payload:
        """Files are read where they are; texts of documents are written into the run's folder."""
        found, named = self.survey, []
        for entry in found.entries:
            path = entry.path
            if entry.text is not None:
                path = fresh(folder, "document")
                with open(path, "xb", opener=private) as out:
                    for piece in values.encoded(entry.text):
                        out.write(piece)
            named.append([entry.name, str(path)])
        args: dict[str, Any] = {
            "lazy_bytes": lazy_bytes,
            "files": named + [[s.name, str(s.path)] for s in found.skipped],
            "skipped": {s.name: s.why for s in found.skipped},
            "encodings": {e.name: e.encoding for e in found.entries if e.encoding != "utf-8"},
        }
        texts = tuple(
            Path(path)
            for (_, path), e in zip(named, found.entries, strict=True)
            if e.text is not None
        )
        if self.files is None:
            paths: tuple[Path, ...] = (self.location, *texts)
        else:
            readable = [entry.path for entry in found.entries if entry.text is None]
            readable += [skipped.path for skipped in found.skipped if skipped.what != UNREADABLE]
            paths = (*dict.fromkeys(readable), *texts)
        largest = max((e.bytes for e in found.entries if e.bytes <= lazy_bytes), default=0)
        return Payload(
            "folder", self.path, self.bytes or 0, args, paths, memory=(64 << 20) + 8 * largest
        )

    def _file_payload(
        self, folder: Path, lazy_bytes: int, limit: int, stop: Callable[[], bool]
    ) -> Payload:
        size, path, args = regular_size(self.location), self.location, {"name": self.location.name}
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
            with (
                opened(self.location, self.compression) as source,
                open(target, "xb", opener=private) as out,
            ):
                while piece := source.read(values.PIECE):
                    text = decoder.decode(piece)
                    written += out.write(
                        (without_mark(text) if written == 0 else text).encode("utf-8")
                    )
                    if written > limit:
                        raise ContextError(
                            f"context: {self.path} unpacks to more than {limit:,} bytes. Allow more with "
                            "Limits(unpacked=...), or unpack it and give the plain file, which is not copied."
                        )
                    if stop():
                        raise ContextError(f"context: unpacking {self.path} was stopped.")
                out.write(decoder.decode(b"", True).encode("utf-8"))
        except damage(UnicodeDecodeError) as error:
            target.unlink(missing_ok=True)
            raise ContextError(
                f"context: {self.path} cannot be read as {self.encoding} text: {error}."
            ) from None
        except ContextError:
            target.unlink(missing_ok=True)
            raise
        if written == 0:
            target.unlink(missing_ok=True)
            raise ContextError(f"context: {self.path} unpacks to an empty text.")
        return target.stat().st_size

    def _pieces(self) -> Iterator[Raw]:
        if self.kind == "file":
            with open(self.location, "rb") as file:
                while piece := file.read(values.PIECE):
                    yield piece
        elif self.kind == "str":
            yield from values.encoded(self.value)
        else:
            yield self.value if self.kind == "bytes" else self._json

    @cached_property
    def sha256(self) -> str | None:
        """Of the bytes; None for folders, several files and files above HASH_LIMIT."""
        digest = hashlib.sha256()
        if self.kind == "folder" or (
            self.kind == "file" and self.location.stat().st_size > HASH_LIMIT
        ):
            return None
        for piece in self._pieces():
            digest.update(piece)
        return digest.hexdigest()

    def record(self, blobs: Path | None = None, name: str = "context") -> dict[str, Any]:
        """The fields of the trajectory's `context` event. An in-memory context, and a file that
        will be gone, is stored once under its hash in `blobs` (the file, if it is no larger than
        HASH_LIMIT); other files and folders are named, not copied."""
        in_memory = self.kind not in ("file", "folder")
        blob = self.sha256 if blobs is not None and (in_memory or self.keep) else None
        if blobs is not None and blob is not None:
            store(blobs, blob, self._pieces())
        return {
            "name": name,
            "kind": self.kind,
            "chars": self.chars,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "blob": blob,
            "path": None if in_memory or self.keep or self.path is None else str(self.path),
            "preview": self.preview(600),
            "reading": self._reading_record(),
        }

    def _reading_record(self) -> dict[str, Any]:
        """How a replay has to read the files."""
        if self.kind == "file":
            return {} if self.encoding == "utf-8" else {"encoding": self.encoding}
        if self.kind != "folder":
            return {"about": self.about} if self.about else {}
        files = (
            {}
            if self.files is None
            else {"files": [[name, str(path)] for name, path in self.files]}
        )
        return self.reading.record() | files

    @classmethod
    def from_record(cls, fields: Mapping[str, Any], blobs: Path | None) -> Context:
        """The context of a recorded run. Raises ContextError where its blob or file is gone or has
        changed."""
        kind, blob, path = fields["kind"], fields.get("blob"), fields.get("path")
        recorded = dict(fields.get("reading") or {})
        reading, files = Reading.of(recorded), recorded.get("files")
        if blob is None and path is not None:
            context = cls._of_path(Path(path), reading)
        elif blob is None and files:
            context = cls(
                "folder", files=tuple((n, Path(p)) for n, p in files), reading=reading
            )._with_texts("it holds")
        elif blob is not None and blobs is not None and (Path(blobs) / Path(blob).name).is_file():
            stored = Path(blobs) / Path(blob).name
            data = stored.read_bytes() if kind != "file" else b""
            if kind == "file":
                context = cls._of_file(stored, reading.encoding or "utf-8")
            elif kind == "str":
                context = cls._checked("str", data.decode("utf-8", "surrogatepass"))
            else:
                context = cls.of(data if kind == "bytes" else json.loads(data))
        else:
            raise ContextError("context: the recorded run kept neither the context nor its path.")
        wanted = fields.get("sha256")
        if wanted is not None and context.sha256 != wanted:
            raise ContextError(
                f"context: {path or blob} is not what the recorded run read (its hash differs)."
            )
        return context

    # -- what the root sees

    def describe(self, limit: int = 1400, name: str = "context") -> str:
        """Type, size, structure and a preview of at most about `limit` characters; never the whole
        of a long text.
        `name`: the variable it is bound to."""
        preview = self.preview(limit) if limit > 0 else ""
        return "\n".join([*describe.facts(self, name), *([preview] if preview else [])])

    def brief(self, limit: int = 40) -> str:
        """Type, size and the first `limit` characters in one line, for models with a small
        window."""
        return describe.brief(self, limit)

    def preview(self, limit: int = 1400) -> str:
        """The beginning and the end, quoted as Python literals: nothing in it can pass for the
        runtime's own words."""
        return describe.preview(self, limit)


def _document(path: Path) -> str | None:
    """The kind of document a file is. Raises ContextError."""
    regular_size(path)
    with open(path, "rb") as file:
        return extract.kind_of(path.name, file.read(8))


def _codec(encoding: str) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise ContextError(
            f"context: unknown encoding {encoding!r}; examples: utf-8, latin-1, cp1252, utf-16."
        ) from None


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
