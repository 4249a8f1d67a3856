"""Where text comes from, by the name in `config.data.source`: the standard library, TFDS, files."""

from __future__ import annotations

import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from typing import Any

from mor_jax.config import DataConfig
from mor_jax.data.chat import conversation_text
from mor_jax.data.documents import Digest, Document, TextSource, digest_of, hash_file
from mor_jax.data.files import Files
from mor_jax.errors import DataError
from mor_jax.paths import is_local

# Generated files would make the held-out share measure table lookup: 1.6 MB of character tables in
# `encodings`, the paths of this machine's build in `_sysconfigdata*`.
GENERATED = "_sysconfigdata"
EXCLUDED = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "encodings",
        "__pycache__",
    }
)


class PyStdlib:
    """The Python standard library that runs this process, about 12 MB: one document a .py file, in
    order of relative path, which is also its id.

    Files are decoded by their coding cookie. The few whose bytes do not fit it are left out;
    `skipped` counts them during the latest run through `documents`.
    """

    label = "pystdlib"

    def __init__(self, cfg: DataConfig, digest: Digest = hash_file):
        self._root = sysconfig.get_paths()["stdlib"]
        self._digest = digest
        self.skipped = 0

    def documents(self) -> Iterator[Document]:
        self.skipped = 0
        for name in self._names():
            path = os.path.join(self._root, name)
            try:
                with tokenize.open(path) as f:
                    text = f.read()
            except (SyntaxError, UnicodeDecodeError):
                self.skipped += 1
                continue
            except OSError as e:
                raise DataError(
                    f"{path}: cannot be read ({e.strerror or e}). Is the Python installation damaged?"
                ) from e
            yield Document(name, text)

    def fingerprint(self) -> str:
        parts = (
            part for n in self._names() for part in (n, self._digest(os.path.join(self._root, n)))
        )
        return digest_of("pystdlib", *parts)

    def _names(self) -> list[str]:
        names = []
        for directory, subdirectories, files in os.walk(self._root):
            subdirectories[:] = [d for d in subdirectories if d not in EXCLUDED]
            names += [
                os.path.relpath(os.path.join(directory, f), self._root)
                for f in files
                if f.endswith(".py") and not f.startswith(GENERATED)
            ]
        return sorted(name.replace(os.sep, "/") for name in names)


READ_AT_ONCE = 64  # records


class TfdsText:
    """A text data set that TFDS has prepared as array_record; TensorFlow is not needed. Documents
    of one split, in stored order; ids are "data set:index".

    `cfg.paths[0]` is the directory that holds dataset_info.json; or `cfg.name` is looked up where
    TFDS keeps its data ($TFDS_DATA_DIR, else ~/tensorflow_datasets); with both, under
    `cfg.paths[0]`.

    Raises:
      DataError: no such data set, not prepared, not array_record, no such split, no such field.
    """

    def __init__(self, cfg: DataConfig, digest: Digest = hash_file):
        self._key, self._split, self._digest = cfg.key, cfg.split, digest
        self._chat = cfg.format == "chat"
        self._info, self._records = _open(cfg)
        self.label = f"tfds {self._info.full_name}, split {cfg.split}"
        fields = list(self._info.features.keys()) if hasattr(self._info.features, "keys") else []
        if self._key not in fields:
            raise DataError(
                f"{self.label}: no field {self._key!r}. Fields present: {', '.join(map(repr, fields)) or 'none'}. "
                "Set config.data.text_key."
            )

    def documents(self) -> Iterator[Document]:
        total = len(self._records)
        for start in range(0, total, READ_AT_ONCE):
            indices = list(range(start, min(total, start + READ_AT_ONCE)))
            try:
                batch = self._records.__getitems__(indices)
            # array_record raises bare RuntimeError for anything wrong with a file
            except Exception as e:
                raise DataError(
                    f"{self.label}: record {start} or one of the {len(indices) - 1} after it cannot be read ({e}). "
                    "Prepare the data set again."
                ) from e
            for index, record in zip(indices, batch, strict=True):
                text = record[self._key]
                if self._chat:
                    text = conversation_text(_messages(text), f"{self.label}, record {index}")
                if not isinstance(text, (bytes, str)):
                    raise DataError(
                        f"{self.label}, record {index}: field {self._key!r} is not text but {type(text).__name__}."
                    )
                if isinstance(text, bytes):
                    text = text.decode("utf-8", "replace")
                yield Document(f"{self._info.full_name}:{index}", text)

    def fingerprint(self) -> str:
        parts = [
            "tfds",
            self._info.full_name,
            self._split,
            self._key,
            *(["chat"] if self._chat else []),
        ]
        for name in sorted(self._info.splits):
            split = self._info.splits[name]
            parts += [name, str(split.num_bytes), str(split.shard_lengths)]
            for path in map(str, split.filepaths):
                # A remote shard is not downloaded just to be hashed; sizes and lengths have to do.
                parts += [
                    os.path.basename(path),
                    self._digest(path) if os.path.exists(path) else "",
                ]
        return digest_of(*parts)


def _messages(value: Any) -> Any:
    """Messages as a list of objects. TFDS gives a sequence of records as one record of arrays, and
    text as bytes."""
    if isinstance(value, dict):
        value = [
            dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)
        ]

    def text(v: Any) -> Any:
        return (
            v.decode("utf-8", "replace")
            if isinstance(v, bytes)
            else getattr(v, "item", lambda: v)()
        )

    return [{k: text(v) for k, v in m.items()} if isinstance(m, dict) else m for m in value]


def _open(cfg: DataConfig) -> tuple[Any, Any]:
    """(DatasetInfo, random-access source of the split)"""
    import tensorflow_datasets as tfds

    directory = os.path.expanduser(cfg.paths[0]) if cfg.paths else None
    if directory and not is_local(directory):
        raise DataError(
            f"{directory}: the records of a TFDS data set (array_record) can be read from this machine's files only. Copy "
            "or mount it here; jsonl and parquet files are read from object stores by config.data.source=files."
        )
    if cfg.name:
        try:
            builder = tfds.builder(cfg.name, **({"data_dir": directory} if directory else {}))
        except Exception as e:  # an unknown name, namespace or config; each raises its own kind
            raise DataError(
                f"config.data.name = {cfg.name!r} is not a data set that TFDS knows or finds prepared "
                f"({str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__}). "
                "For one of your own, give its directory (the one with dataset_info.json) in config.data.paths."
            ) from e
    else:
        try:
            builder = tfds.builder_from_directory(directory)
        except Exception as e:
            raise DataError(
                f"{directory}: not a prepared TFDS data set ({e}). Give the directory that holds dataset_info.json, "
                "e.g. ~/tensorflow_datasets/wiki40b/en/1.3.0."
            ) from e
    info = builder.info
    again = f"Prepare it with: tfds build {cfg.name or info.full_name} --file_format=array_record"
    if not info.splits:
        raise DataError(f"tfds {info.full_name} is not prepared under {builder.data_dir}. {again}")
    try:
        return info, builder.as_data_source(cfg.split)
    except NotImplementedError as e:
        was = info.file_format.value if info.file_format else "an unknown format"
        raise DataError(
            f"tfds {info.full_name} in {builder.data_dir} was prepared as {was}; only array_record can be read without "
            f"TensorFlow. {again} (into another data_dir, or after deleting this one)."
        ) from e
    except ValueError as e:
        raise DataError(f"config.data.split = {cfg.split!r} of tfds {info.full_name}: {e}") from e


__all__ = ["REGISTRY", "Document", "TextSource", "open_source"]

REGISTRY: dict[str, Callable[[DataConfig, Digest], TextSource]] = {
    "pystdlib": PyStdlib,
    "files": Files,
    "tfds": TfdsText,
}


def open_source(cfg: DataConfig, digest: Digest = hash_file) -> TextSource:
    """The source that `cfg.source` names. `digest` hashes a file; pass a HashMemo to remember large
    ones.

    Raises DataError where the source cannot be opened (see the class of each)."""
    if cfg.source not in REGISTRY:
        raise DataError(f"config.data.source = {cfg.source!r} is not one of {', '.join(REGISTRY)}.")
    return REGISTRY[cfg.source](cfg, digest)
