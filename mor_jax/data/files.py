"""The `files` source: globs over .txt, .md, .py, .jsonl and .parquet, each optionally .gz, .xz or .zst."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator

from mor_jax.config import DataConfig
from mor_jax.data.compression import READ_ERRORS, SUFFIXES, open_bytes
from mor_jax.data.documents import Digest, Document
from mor_jax.data.hashing import digest_of, hash_file
from mor_jax.errors import DataError

TEXTS = (".txt", ".md", ".py")  # one document a file
RECORDS = (".jsonl", ".parquet")  # one document a line or row


class Files:
    """Documents of the files that match `cfg.paths`, in order of relative path, then of line or row.

    Ids are "relative/path" for texts and "relative/path:n" (n from 1) for records, relative to the deepest directory
    that no glob of `cfg.paths` can leave: they do not change when files are added or the corpus is moved.

    Raises:
      DataError: a glob matches nothing, or a file has an unknown suffix.
    """

    def __init__(self, cfg: DataConfig, digest: Digest = hash_file):
        self.label = f"files {', '.join(cfg.paths)}"
        self._key = cfg.text_key
        self._digest = digest
        self._files = _find(cfg.paths)  # relative path -> path
        for path in self._files.values():
            _kind(path)

    def documents(self) -> Iterator[Document]:
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
            except READ_ERRORS as e:
                what = f"{compression[1:]} data" if compression else "a file"
                raise DataError(
                    f"{path}: cannot be read as {what} ({e}). If it is cut off or damaged, fetch it again; "
                    "otherwise check its permissions, or leave it out of config.data.paths."
                ) from e

    def fingerprint(self) -> str:
        return digest_of("files", self._key, *(part for n, p in self._files.items() for part in (n, self._digest(p))))

    def _jsonl(self, name: str, path: str, compression: str) -> Iterator[Document]:
        with open_bytes(path, compression) as f:
            for number, raw in enumerate(f, 1):
                where = f"{path}, line {number}"
                line = _decode(raw, where)
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise DataError(
                        f"{where}: not valid JSON ({e}): {_short(line)}. A .jsonl file holds one JSON object a line."
                    ) from e
                if not isinstance(record, dict):
                    raise DataError(f"{where}: expected a JSON object with a field {self._key!r}, got {_short(line)}.")
                yield Document(f"{name}:{number}", _field(record, self._key, where))

    def _parquet(self, name: str, path: str, compression: str) -> Iterator[Document]:
        pa, parquet = _import_pyarrow(path)
        with tempfile.TemporaryFile() as whole:
            source = path
            if compression:  # parquet is read from its end, so it has to be seekable
                with open_bytes(path, compression) as f:
                    shutil.copyfileobj(f, whole, 1 << 20)
                whole.seek(0)
                source = whole
            try:
                with parquet.ParquetFile(source) as table:
                    if self._key not in table.schema_arrow.names:
                        raise DataError(_missing(self._key, table.schema_arrow.names, path))
                    number = 0
                    for batch in table.iter_batches(batch_size=256, columns=[self._key]):
                        for text in batch.column(0).to_pylist():
                            number += 1
                            yield Document(
                                f"{name}:{number}", _field({self._key: text}, self._key, f"{path}, row {number}")
                            )
            except pa.ArrowException as e:
                raise DataError(f"{path}: not a readable parquet file ({e}). Fetch or write it again.") from e


def _find(patterns: tuple[str, ...]) -> dict[str, str]:
    """{relative path: path} of the files that match, sorted by relative path."""
    paths: set[str] = set()
    roots = []
    for pattern in map(os.path.expanduser, patterns):
        exact = os.path.abspath(pattern)
        if os.path.isfile(exact):  # even when its name has brackets in it
            found, root = [exact], os.path.dirname(exact)
        else:
            full = os.path.normpath(os.path.join(glob.escape(os.getcwd()), pattern))
            found = [p for p in glob.glob(full, recursive=True) if not os.path.isdir(p)]
            root = _fixed_directory(full)
        if not found:
            hint = f" It is a directory: give a glob such as {exact}/*.jsonl." if os.path.isdir(exact) else ""
            raise DataError(f"config.data.paths: {exact} matches no file.{hint}")
        paths.update(found)
        roots.append(root)
    common = os.path.commonpath(roots)
    return dict(sorted((os.path.relpath(p, common).replace(os.sep, "/"), p) for p in paths))


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


def _field(record: dict, key: str, where: str) -> str:
    if key not in record:
        raise DataError(_missing(key, record, where))
    if not isinstance(record[key], str):
        raise DataError(f"{where}: field {key!r} must be text, got {_short(repr(record[key]))}.")
    return record[key]


def _missing(key: str, present, where: str) -> str:
    return f"{where}: no field {key!r}. Fields present: {', '.join(map(repr, present)) or 'none'}. Set config.data.text_key."


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def _import_pyarrow(path: str):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise DataError(
            f"{path}: reading .parquet needs the pyarrow package: pip install pyarrow (it is in the extra data)"
        ) from e
    return pyarrow, pyarrow.parquet
