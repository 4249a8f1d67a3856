"""The `files` source: globs over .txt, .md, .py, .jsonl and .parquet, each optionally .gz, .xz or
.zst."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, ParamSpec

from mor_jax.config import DataConfig
from mor_jax.data.chat import PAIR, conversation_text, pair_text
from mor_jax.data.documents import (
    READ_ERRORS,
    SUFFIXES,
    Digest,
    Document,
    digest_of,
    hash_file,
    open_bytes,
)
from mor_jax.errors import DataError, UserError
from mor_jax.paths import SERVED, as_path, filesystem, is_local, reason, scheme_of

P = ParamSpec("P")
TEXTS = (".txt", ".md", ".py")  # one document a file
RECORDS = (".jsonl", ".parquet")  # one document a line or row


class Files:
    """Documents of the files that match `cfg.paths`, in order of relative path, then of line or
    row.

    Ids are "relative/path" for texts and "relative/path:n" (n from 1) for records, relative to the
    deepest directory that no glob of `cfg.paths` can leave: they do not change when files are added
    or the corpus is moved.

    Raises:
      DataError: a glob matches nothing, or a file has an unknown suffix.
    """

    def __init__(self, cfg: DataConfig, digest: Digest = hash_file):
        self.label = f"files {', '.join(cfg.paths)}"
        self._key, self._format = cfg.key, cfg.format
        self._digest, self._skip = digest, cfg.bad_records == "skip"
        self.skipped_records = 0  # of the last reading
        self._files = _find(cfg.paths)  # relative path -> path
        for path in self._files.values():
            _kind(path)

    def documents(self) -> Iterator[Document]:
        self.skipped_records = 0
        for name, path in self._files.items():
            suffix, compression = _kind(path)
            try:
                if suffix == ".jsonl":
                    yield from self._jsonl(name, path, compression)
                elif suffix == ".parquet":
                    yield from self._parquet(name, path, compression)
                else:
                    with open_bytes(path, compression) as f:
                        yield Document(name, _decode(f.read(), path))
            except UserError:
                raise
            except Exception as e:
                if is_local(path) and not isinstance(e, READ_ERRORS):
                    raise  # clients of object stores have their own kinds
                what = f"{compression[1:]} data" if compression else "a file"
                raise DataError(
                    f"{path}: cannot be read as {what} ({e}). If it is cut off or damaged, fetch it again; "
                    "otherwise check its permissions, or leave it out of config.data.paths."
                ) from e

    def fingerprint(self) -> str:
        parts = (
            self._key,
            *(["skip"] if self._skip else []),
            *([self._format] if self._format != "text" else []),
        )
        return digest_of(
            "files",
            *parts,
            *(part for n, p in self._files.items() for part in (n, self._digest(p))),
        )

    def _field(self, record: dict[str, Any], where: str) -> str:
        """The text of a record; of a conversation, its messages as JSON, of a pair both."""
        if self._format == "preference":
            return pair_text(record, where)
        if self._key not in record:
            raise DataError(_missing(self._key, record, where))
        value = record[self._key]
        if self._format == "chat":
            return conversation_text(value, where)
        if not isinstance(value, str):
            raise DataError(
                f"{where}: field {self._key!r} must be text, got {_short(repr(value))}."
            )
        return value

    def _jsonl(self, name: str, path: str, compression: str) -> Iterator[Document]:
        with open_bytes(path, compression) as f:
            for number, raw in enumerate(f, 1):
                if (
                    len(raw) < 64
                    and not raw.decode("utf-8", "ignore").removeprefix("\ufeff").strip()
                ):
                    continue  # a blank line
                text = self._or_skip(self._line, raw, f"{path}, line {number}")
                if text is not None:
                    yield Document(f"{name}:{number}", text)

    def _line(self, raw: bytes, where: str) -> str:
        return self._field(_record(raw, self._key, where), where)

    def _or_skip(self, read: Callable[P, str], /, *args: P.args, **kwargs: P.kwargs) -> str | None:
        """What `read` gives; None, and a count, for a bad record where those are skipped."""
        try:
            return read(*args, **kwargs)
        except DataError as e:
            if not self._skip:
                raise DataError(
                    f"{e} To leave such records out: --config.data.bad_records=skip."
                ) from e
            self.skipped_records += 1
            return None

    def _parquet(self, name: str, path: str, compression: str) -> Iterator[Document]:
        pa, parquet = _import_pyarrow(path)
        with tempfile.TemporaryFile() as whole, contextlib.ExitStack() as stack:
            source = path if is_local(path) else stack.enter_context(open_bytes(path, compression))
            if compression:  # parquet is read from its end, so it has to be seekable
                with open_bytes(path, compression) as f:
                    shutil.copyfileobj(f, whole, 1 << 20)
                whole.seek(0)
                source = whole
            try:
                with parquet.ParquetFile(source) as table:
                    names = table.schema_arrow.names
                    columns = [self._key]
                    if self._format == "preference":
                        columns = [name for name in PAIR if name in names]
                    elif self._key not in names:
                        raise DataError(_missing(self._key, names, path))
                    number = 0
                    for batch in table.iter_batches(batch_size=256, columns=columns):
                        for record in batch.to_pylist():
                            number += 1
                            where = f"{path}, row {number}"
                            text = self._or_skip(self._field, record, where)
                            if text is not None:
                                yield Document(f"{name}:{number}", text)
            except pa.ArrowException as e:
                raise DataError(
                    f"{path}: not a readable parquet file ({e}). Fetch or write it again."
                ) from e


def _find(patterns: tuple[str, ...]) -> dict[str, str]:
    """{relative path: path} of the files that match, sorted by relative path."""
    paths: set[str] = set()
    roots = []
    for pattern in map(os.path.expanduser, patterns):
        if not is_local(pattern):
            found, root = _find_remote(pattern)
            paths.update(found)
            roots.append(root)
            continue
        exact = os.path.abspath(pattern)
        if os.path.isfile(exact):  # even when its name has brackets in it
            found, root = [exact], os.path.dirname(exact)
        else:
            full = os.path.normpath(os.path.join(glob.escape(os.getcwd()), pattern))
            found = [p for p in glob.glob(full, recursive=True) if not os.path.isdir(p)]
            root = _fixed_directory(full)
        if not found:
            hint = (
                f" It is a directory: give a glob such as {exact}/*.jsonl."
                if os.path.isdir(exact)
                else ""
            )
            raise DataError(f"config.data.paths: {exact} matches no file.{hint}")
        paths.update(found)
        roots.append(root)
    common = sum(
        1
        for _ in itertools.takewhile(
            lambda at: len(set(at)) == 1, zip(*map(_parts, roots), strict=False)
        )
    )
    return dict(sorted(("/".join(_parts(p)[common:]), p) for p in paths))


def _parts(path: str) -> list[str]:
    """From the root down; the first says on which machine or in which store."""
    return [
        scheme_of(path),
        *filter(None, (path.partition("://")[2] or path).replace(os.sep, "/").split("/")),
    ]


def _find_remote(pattern: str) -> tuple[list[str], str]:
    """(addresses that match, directory part of the pattern up to its first wildcard)"""
    if scheme_of(pattern) in SERVED:
        pattern = str(as_path(pattern))  # its bucket can be reached
    store = filesystem(pattern)
    try:
        if store.isfile(pattern):
            return [pattern], os.path.dirname(pattern)
        found = [store.unstrip_protocol(p) for p in store.glob(pattern) if not store.isdir(p)]
        directory = not found and store.isdir(pattern)
    except Exception as e:  # each client has its own kinds
        raise DataError(f"config.data.paths: {pattern} cannot be listed ({reason(e)}).") from e
    if not found:
        hint = f" It is a directory: give a glob such as {pattern}/*.jsonl." if directory else ""
        raise DataError(f"config.data.paths: {pattern} matches no file.{hint}")
    return found, _fixed_directory(pattern)


def _fixed_directory(pattern: str) -> str:
    """The directory part of a pattern up to its first wildcard."""
    head = os.path.dirname(pattern)
    while glob.has_magic(head):
        head = os.path.dirname(head)
    return head


def _kind(path: str) -> tuple[str, str]:
    """(format suffix, compression suffix or "")"""
    stem, compression = os.path.splitext(path)
    if compression not in SUFFIXES:
        stem, compression = path, ""
    suffix = os.path.splitext(stem)[1]
    if suffix not in TEXTS + RECORDS:
        raise DataError(
            f"{path}: no reader for {suffix or 'a file without a suffix'}. Supported: {', '.join(TEXTS + RECORDS)}, "
            f"each optionally followed by {', '.join(SUFFIXES)}. Narrow the glob in config.data.paths."
        )
    return suffix, compression


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{where}: not UTF-8 text (byte 0x{raw[e.start]:02x} at offset {e.start}). Convert it, "
            "e.g. with iconv -f latin1 -t utf-8, or leave it out of config.data.paths."
        ) from e


def _record(raw: bytes, key: str, where: str) -> dict[str, Any]:
    """One line of a .jsonl file. Raises DataError naming `where`."""
    line = _decode(raw, where)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise DataError(
            f"{where}: not valid JSON ({e}): {_short(line)}. A .jsonl file holds one JSON object a line."
        ) from e
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: expected a JSON object with a field {key!r}, got {_short(line)}."
        )
    return record


def _missing(key: str, present: Iterable[object], where: str) -> str:
    return f"{where}: no field {key!r}. Fields present: {', '.join(map(repr, present)) or 'none'}. Set config.data.text_key."


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _import_pyarrow(path: str) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise DataError(
            f"{path}: reading .parquet needs the pyarrow package: pip install pyarrow (it is in the extra data)"
        ) from e
    return pyarrow, pyarrow.parquet
