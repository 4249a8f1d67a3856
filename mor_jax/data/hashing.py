"""Content digests of files, remembered so that a large corpus is not read again at every start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from mor_jax.data.compression import open_file
from mor_jax.errors import DataError, UserError
from mor_jax.paths import filesystem, is_local, reason

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
